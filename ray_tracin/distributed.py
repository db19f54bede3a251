"""Ray Train at the edge: several processes that train one network together.

For networks and data that keep more than one GPU busy. A plain Ray task is the default, because it starts in a
fraction of the time. Importing Ray Train takes seconds, so this module is loaded only when it is asked for.
"""

import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

import torch.distributed
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError, get_context
from ray.train.torch import TorchTrainer, get_device
from torch import nn

from ray_tracin.assignment import TRIES
from ray_tracin.learning import Train
from ray_tracin.objects import StoredFile
from ray_tracin.runs import Run
from ray_tracin.stages import SHARED_SECONDS, Report, StageWorker, done_receipts

T = TypeVar("T")
POLL_SECONDS = 2.0


def execute_with_ray_train(stage: Train, keys: Sequence[Any], report: Report, resources: dict[str, float]) -> None:
    """Train the epochs in ``stage.processes`` processes with DistributedDataParallel; rank 0 writes.

    A process that is lost ends the group, and a new group goes on from the newest checkpoint.

    Raises:
        Exception: what the training raised.
    """
    trainer = TorchTrainer(
        train_together,
        train_loop_config={"stage": stage, "keys": list(keys)},
        scaling_config=ScalingConfig(
            num_workers=stage.processes, use_gpu=resources.get("GPU", 0) > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"train-{stage.run.fingerprint[:12]}",
            # Ray Train wants a place for checkpoints, which the run keeps itself. A folder would stay behind whenever
            # this process ends before the training does.
            storage_path="/",
            storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
            failure_config=FailureConfig(max_failures=TRIES - 1),
        ),
    )
    reported: set[str] = set()

    def report_finished() -> None:
        finished = stage.run.store.receipts(stage.name)
        for key in keys:
            if str(key) in finished and str(key) not in reported:
                reported.add(str(key))
                report(key)

    fitting: Future[object] = Future()

    def fit() -> None:
        try:
            result = trainer.fit()
        except BaseException as error:
            fitting.set_exception(error)
        else:
            fitting.set_result(result)

    # Who must stop, because the run is another driver's by now, must not wait for what may take hours.
    threading.Thread(target=fit, daemon=True, name="fit").start()
    while wait([fitting], POLL_SECONDS).not_done:
        report_finished()
    try:
        fitting.result()
    except WorkerGroupError as error:
        raise _cause(error) from error
    report_finished()


def _cause(error: WorkerGroupError) -> Exception:
    """What a process of the group raised, or that it died, and not what the others made of losing it."""
    failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    raised = [getattr(one, "_base_exc", getattr(one, "health_check_failure", one)) for one in failures]

    def told_last(one: Exception) -> tuple[bool, bool]:
        return not isinstance(one, ValueError | OSError), not isinstance(one, RayError)

    return min(raised, key=told_last, default=error)


def train_together(config: dict[str, Any]) -> None:
    """What every process does: its share of every epoch."""
    stage: Train = config["stage"]
    context = get_context()
    rank, device = context.get_world_rank(), get_device()
    # Who sees more or less as finished, on a folder that shows late what others write, would train other epochs.
    finished = told_by_first(set(done_receipts(stage)) if rank == 0 else set(), device)
    work = stage.open_share(
        rank,
        agree=partial(state_of_first, run=stage.run, device=device),
        world_size=context.get_world_size(),
        wrap=partial(_averaging_gradients, device=device),
        average=partial(_average, device=device),
    )
    do = StageWorker(stage, work).do if rank == 0 else work
    for key in config["keys"]:
        if str(key) not in finished:
            do(key)


def told_by_first(value: T, device: torch.device) -> T:
    """The value that rank 0 has. Every process must ask."""
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0, device=device)
    return told[0]


def state_of_first(state: StoredFile | None, run: Run, device: torch.device) -> StoredFile | None:
    """The state that rank 0 has found, whatever this process has, once it sees that one.

    Processes that go on from different epochs would average gradients of different networks without a word.

    Raises:
        ValueError: it doesn't see it.
    """
    chosen = told_by_first(state, device)
    if chosen is not None and chosen != state:
        _await(chosen, run)
    return chosen


def _await(file: StoredFile, run: Run) -> None:
    """Nothing, once this process sees the file as it was written; a shared folder gets a minute for it."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not _is_whole(file, run):
        if time.monotonic() > deadline:
            raise ValueError(
                f"training goes on from {file.path}, of {file.size} bytes where it was read first, and "
                f"{socket.gethostname()} doesn't see it so in {run.uri}: give --run s3://… or gs://…, or a folder that "
                "all nodes share"
            )
        time.sleep(POLL_SECONDS)


def _is_whole(file: StoredFile, run: Run) -> bool:
    try:
        return run.store.objects.checksum(file.path) == file.crc32c
    except FileNotFoundError:
        return False


def _averaging_gradients(network: nn.Module, device: torch.device) -> nn.Module:
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=devices)


def _average(value: float, device: torch.device) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()
