"""What a worker asks of a cluster, and how many the nodes of it have room for."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import torch

from ray_tracin.pipeline import is_prepared
from ray_tracin.planning import GIB
from ray_tracin.runs import Run
from ray_tracin.stages import Stage
from ray_tracin.vocabulary import UsageError

WAITING_SECONDS = 60.0
"""After this long without any worker, a line says what a stage waits for."""

logger = logging.getLogger(__name__)


def on_one_device(run: Run, kind: str) -> Run:
    """The run with ``resources.device`` settled, for its plan and all of its workers, where the user leaves it open.

    A GPU where Ray, which is of some kind of `runtime.cluster`, has one, and where workers may be on this machine alone
    PyTorch has it too.

    Raises:
        UsageError: a GPU is asked for, there is none and won't be, and nothing was done yet that can be looked at.
    """
    resources, gpus = run.config.resources, ray.cluster_resources().get("GPU", 0)
    if resources.device != "auto":
        if resources.device == "cuda" and not gpus and kind != "cluster" and not is_prepared(run):
            raise UsageError(
                "resources.device is cuda, and Ray finds no GPU on this machine: leave it out, or give --address of a "
                "cluster that has them"
            )
        return run
    there = gpus and (torch.cuda.is_available() or kind == "cluster")
    settled = resources.model_copy(update={"device": "cuda" if there else "cpu"})
    return replace(run, config=run.config.model_copy(update={"resources": settled}))


def resource_options(stage: Stage[Any], cpus: float) -> dict[str, Any]:
    """What one worker of the stage holds: a share of a GPU where there are GPUs and the stage uses them, else CPUs."""
    resources = stage.run.config.resources
    gpus = ray.cluster_resources().get("GPU", 0)
    # On a cluster that grows on demand there may be no GPU until one is asked for.
    wanted = resources.device == "cuda" or (resources.device == "auto" and gpus)
    if stage.uses_gpu and wanted:
        # A GPU worker must not hold a CPU for life: plain tasks beside it would starve on a small node.
        return {"num_gpus": resources.gpus_per_worker, "num_cpus": 0}
    return {"num_cpus": cpus}


def room_for(options: dict[str, Any], avoid: set[str] | None = None) -> int:
    """How many workers of these options the nodes that are there have room for, if they do nothing else."""
    wanted = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    needs = {name: need for name, need in wanted.items() if need}
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in (avoid or ())]
    return sum(min(_fitting(node["Resources"].get(name, 0), need) for name, need in needs.items()) for node in nodes)


def _fitting(there: int | float, need: int | float) -> int:
    """How often a resource is there; a share of one can't be put together from several."""
    return int(there) * int(1 / need) if need < 1 else int(there / need)


def most_cpus() -> float:
    """Those of the node that has most; 1 where no node has any yet."""
    return max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0) or 1.0


def refuse_nodes_without_memory(stage: Stage[Any], options: dict[str, Any], need: int) -> None:
    """Nothing, if a node has the memory for a worker, or if none is there yet that could have one.

    Raises:
        ValueError: nodes have the CPUs or GPUs for a worker, and none of them has the memory.
    """
    if not room_for(options) or room_for({**options, "memory": need}):
        return
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    raise ValueError(
        f"stage {stage.name}: a worker may need {need / GIB:.2f} GiB, and the node with the most memory has "
        f"{most / GIB:.2f} GiB for Ray: lower resources.batch_slices, use nodes with more memory, or lower, in a new "
        "run, gradients.shard_slices or influence.tile_slices"
    )


@contextmanager
def waiting_told(stage: Stage[Any], options: dict[str, Any]) -> Iterator[None]:
    """Says after a while what a stage waits for, where no node has it."""

    def say() -> None:
        if not room_for(options):
            say_it_waits(stage, options)

    timer = threading.Timer(WAITING_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say_it_waits(stage: Stage[Any], options: dict[str, Any]) -> None:
    """A line for who wonders why nothing happens."""
    logger.warning("%s waits for a node that has %s", stage.name, _shown(options))


def _shown(options: dict[str, Any]) -> str:
    wanted = {"CPUs": options.get("num_cpus"), "GPUs": options.get("num_gpus"), "GiB": options.get("memory", 0) / 2**30}
    return ", ".join(f"{need:.3g} {name}" for name, need in wanted.items() if need)
