"""How time and memory grow: with rows and with parameters in one process, with workers on a run's own stages under Ray.

    ray-tracin demo --run demo
    python benchmarks/scaling.py --run demo

Rows and parameters: a process each, one thread, the slices of ``benchmarks/engine.py``; gradients, then their kernel.
Workers: the gradient shards and tiles of a copy of the run are computed anew by one and by two workers of one thread
each. The first checkpoint warms the workers up; the others are timed from the first start to the last end in their
receipts, so that neither Ray's start nor torch's import counts.
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from engine import CLASSES, make_problem, peak_bytes
from torch import Tensor

from ray_tracin.attribution import Differentiate
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.influence import EXPANDED_VALUES, tile_kernel
from ray_tracin.layers import Segment
from ray_tracin.runs import Run, start_run
from ray_tracin.runtime import RayExecutor, cluster
from ray_tracin.stages import Stage, complete
from ray_tracin.tiling import ComputeTiles
from ray_tracin.unet import HEAD
from ray_tracin.vocabulary import checkpoint_name

BATCH = 8
MEBIBYTE = 1 << 20
AGAIN = ("gradients", "tiles")
"""What is computed anew: the stages' receipts and arrays are left out of the copies."""

Point = dict[str, float]


def measure_point(slices: int, width: int, size: int) -> Point:
    """Seconds of gradients and of their kernel, and what they add to the peak memory of this process."""
    torch.set_num_threads(1)
    network, images, labels, masks = make_problem(slices, width, size)
    before = peak_bytes(torch.device("cpu"))
    engine = RegionDifferentiator(network, head=HEAD, parameters="all", example=images[0], classes=CLASSES)
    started = time.perf_counter()
    batches = zip(images.split(BATCH), labels.split(BATCH), masks.split(BATCH), strict=True)
    rows = torch.empty(slices, engine.layout.values)
    for start, batch in zip(range(0, slices, BATCH), batches, strict=True):
        rows[start : start + BATCH] = engine.differentiate(*batch).values
    differentiated = time.perf_counter()

    def read(segment: Segment) -> Tensor:
        return rows[:, segment.offset : segment.stop]

    tile_kernel(engine.layout, read, None, chunk_values=EXPANDED_VALUES["cpu"])
    return {
        "gradients": differentiated - started,
        "kernel": time.perf_counter() - differentiated,
        "peak": peak_bytes(torch.device("cpu")) - before,
        "parameters": engine.layout.columns,
    }


def in_own_process(slices: int, width: int, size: int) -> Point:
    """The point, measured in a process of its own."""
    command = [sys.executable, __file__, f"--point={slices},{width},{size}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def grow(points: Sequence[tuple[int, int, int]], along: int, title: str) -> Iterator[str]:
    """A table of points along one axis (0 slices, 1 width), with the exponents between neighbours."""
    found = [in_own_process(*point) for point in points]
    yield from (
        title,
        "",
        "| slices | rows | width | parameters | gradients, s | exponent | kernel, s | exponent | memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    sizes = [point[0] if along == 0 else one["parameters"] for point, one in zip(points, found, strict=True)]
    exponents = {name: ["", *_exponents(sizes, [one[name] for one in found])] for name in ("gradients", "kernel")}
    for number, (point, one) in enumerate(zip(points, found, strict=True)):
        yield (
            f"| {point[0]} | {point[0] * CLASSES} | {point[1]} | {one['parameters']:,.0f} | {one['gradients']:.2f} | "
            f"{exponents['gradients'][number]} | {one['kernel']:.2f} | {exponents['kernel'][number]} | "
            f"{one['peak'] / MEBIBYTE:.0f} |"
        )
    yield ""


def _exponents(sizes: Sequence[float], values: Sequence[float]) -> list[str]:
    """How the values grow from one size to the next: 1 is linear, 2 quadratic."""
    steps = zip(pairwise(sizes), pairwise(values), strict=True)
    return [f"{math.log(values[1] / values[0]) / math.log(sizes[1] / sizes[0]):.2f}" for sizes, values in steps]


def without_results(source: str, target: Path, workers: int) -> Run:
    """A copy of the run whose gradients and tiles are not computed."""
    dropped = {f"{name}.zarr" for name in AGAIN} | {f"{name}.json" for name in AGAIN}

    def ignored(folder: str, names: list[str]) -> set[str]:
        own = set(AGAIN) if Path(folder).name == "receipts" else set()
        return (own | dropped | {"patients"}) & set(names)

    shutil.copytree(source, target, ignore=ignored)
    return start_run(
        target,
        overrides=[
            f"resources.workers={workers}",
            "resources.threads=1",
            "resources.device=cpu",
            "gradients.keep=true",
            "gradients.source=stored",
        ],
    )


def time_workers(source: str, workers: int, folder: Path) -> dict[str, Point]:
    """By stage: seconds from first start to last end of all checkpoints but the first, and the keys' own seconds."""
    run = without_results(source, folder / str(workers), workers)
    first, *others = run.config.influence_epochs()
    found = {}
    with RayExecutor() as pool:
        for name, stages in _stages(run, first, tuple(others)).items():
            for stage in stages:
                complete(stage, pool, lambda event: None)
            receipts = [
                receipt
                for receipt in run.store.receipts(name).values()
                if receipt.key.split("/")[0] != checkpoint_name(first)
            ]
            began = min(receipt.started for receipt in receipts)
            ended = max(receipt.started + receipt.seconds for receipt in receipts)
            found[name] = {
                "seconds": ended - began,
                "work": sum(receipt.seconds for receipt in receipts),
                "peak": max(receipt.peak_memory for receipt in receipts),
                "workers": len({receipt.worker for receipt in receipts}),
                "keys": len(receipts),
            }
    shutil.rmtree(folder / str(workers))
    return found


def _stages(run: Run, first: int, others: tuple[int, ...]) -> dict[str, tuple[Stage[Any], Stage[Any]]]:
    return {
        "gradients": (Differentiate(run, (first,)), Differentiate(run, others)),
        "tiles": (ComputeTiles(run, (first,)), ComputeTiles(run, others)),
    }


def compare_workers(source: str, rounds: int) -> Iterator[str]:
    """The table: each stage by one and by two workers, in turns; the best of the rounds counts."""
    best: dict[tuple[str, int], Point] = {}
    with tempfile.TemporaryDirectory() as folder, cluster("local", cpus=2):
        for _ in range(rounds):
            for workers in (1, 2):
                for name, point in time_workers(source, workers, Path(folder)).items():
                    old = best.get((name, workers))
                    best[name, workers] = point if old is None or point["seconds"] < old["seconds"] else old
    yield from (
        f"Workers of one thread each, all checkpoints but the first, best of {rounds} rounds",
        "",
        "| stage | keys | one worker, s | two workers, s | times as fast | work, two ÷ one | peak of a worker, MiB |",
        "|---|---|---|---|---|---|---|",
    )
    for name in AGAIN:
        one, two = best[name, 1], best[name, 2]
        assert (one["workers"], two["workers"]) == (1, 2), "the pool didn't have the workers that were asked for"
        yield (
            f"| {name} | {one['keys']} | {one['seconds']:.2f} | {two['seconds']:.2f} | "
            f"{one['seconds'] / two['seconds']:.2f} | {two['work'] / one['work']:.2f} | {two['peak'] / MEBIBYTE:.0f} |"
        )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="A finished run; without it, workers are not measured.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slices", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure_point(*map(int, options.point.split(",")))))
        return
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread a process\n"
    )
    width, slices, size = options.widths[:2][-1], options.slices[0], options.size
    for line in grow([(count, width, size) for count in options.slices], 0, f"Rows, at {size}²"):
        print(line, flush=True)
    for line in grow([(slices, one, size) for one in options.widths], 1, f"Parameters, at {size}²"):
        print(line, flush=True)
    if options.run:
        for line in compare_workers(options.run, options.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
