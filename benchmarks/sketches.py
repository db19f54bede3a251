"""What an index of sketches is worth, against its size: agreement with a run's exact tensor, bytes, seconds.

    ray-tracin demo --run demo
    python benchmarks/sketches.py --run demo --sizes 4 8 16 32 64

For each size the sketches of all train and test regions at every influence checkpoint are made from gradients that are
taken once for all sizes, and multiplied; what comes out is compared with ``influence.zarr``, row by row. The influence
of a train region on itself is left out of its row. Nothing is written.
"""

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_tracin.agreement import measure_agreement
from ray_tracin.attribution import differentiator, needed_sets, region_exists
from ray_tracin.indexing import sketcher
from ray_tracin.influence import sum_checkpoints, train_columns, without_absent
from ray_tracin.runs import Run, open_run
from ray_tracin.sketches import Sketcher, estimate_kernel
from ray_tracin.vocabulary import QuerySet


@dataclass
class Index:
    """What one size takes, and its kernels so far."""

    size: int
    values: int = 0
    seconds: float = 0.0
    kernels: dict[QuerySet, list[Tensor]] = field(default_factory=dict)


def build(run: Run, sizes: Sequence[int]) -> tuple[list[Index], float]:
    """An index for each size, and the seconds that the gradients took."""
    found, spent = [Index(size) for size in sizes], 0.0
    for epoch in run.config.influence_epochs():
        engine = differentiator(run, epoch, torch.device("cpu"))
        makers = [sketcher(run, engine.layout, epoch, size) for size in sizes]
        sketches: dict[QuerySet, list[Tensor]] = {}
        for name in needed_sets(run):
            rows = run.query_slices(name)
            parts: list[list[Tensor]] = [[] for _ in sizes]
            for start in range(0, len(rows), run.config.resources.batch_slices):
                began = time.perf_counter()
                batch = engine.differentiate(*_inputs(run, rows[start : start + run.config.resources.batch_slices]))
                spent += time.perf_counter() - began
                for index, maker, part in zip(found, makers, parts, strict=True):
                    part.append(_timed(index, maker, batch.values))
            sketches[name] = [torch.cat(part) for part in parts]
        for name in run.query_sets:
            exists = torch.from_numpy(region_exists(run, run.query_slices(name), epoch))
            train = torch.from_numpy(region_exists(run, run.train_slices, epoch))
            for position, index in enumerate(found):
                kernel = estimate_kernel(sketches[name][position], sketches["train"][position])
                index.kernels.setdefault(name, []).append(train_columns(without_absent(kernel, exists, train)))
    return found, spent


def _timed(index: Index, maker: Sketcher, values: Tensor) -> Tensor:
    began = time.perf_counter()
    sketches = maker.sketch(values)
    index.seconds += time.perf_counter() - began
    index.values = sketches.shape[2]
    return sketches


def _inputs(run: Run, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    masks, labels = (run.store.read(f"regions.zarr/{name}")[list(rows)] for name in ("mask", "labels"))
    return torch.from_numpy(run.images(rows)), torch.from_numpy(labels), torch.from_numpy(masks)


def compare(run: Run, sizes: Sequence[int]) -> str:
    """The table: for each size and query set what the index takes, and how far it agrees."""
    if run.config.regions.source != "final" or run.config.gradients.score != "region":
        raise ValueError("this benchmark reads the regions of the final network: use a run with the default settings")
    indexes, spent = build(run, sizes)
    rates, epochs = run.learning_rates, len(run.config.influence_epochs())
    regions = len(run.classes) * len(run.train_slices)
    lines = [
        f"{len(run.train_slices)} train slices × {len(run.classes)} classes, {epochs} checkpoints, UNet of width "
        f"{run.config.model.width} at {run.config.data.size}²; the gradients of all regions took {spent:.1f} s; torch "
        f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} "
        "threads",
        "",
        "| size | values | index, MiB | projecting, s | queries | difference | Spearman | lowest | top 10 | top 20 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for index in indexes:
        mebibytes = 4 * epochs * regions * index.values / 2**20
        for name in run.query_sets:
            exact = torch.from_numpy(run.store.read(f"influence.zarr/{name}")).flatten(0, 1)
            if name == "train":
                exact.fill_diagonal_(torch.nan)
            estimate = sum_checkpoints(torch.stack(index.kernels[name]), rates).flatten(0, 1)
            found = measure_agreement(estimate, exact)
            measures = (found.spearman, found.spearman_worst, found.top_10, found.top_20)
            shown = " | ".join(f"{value:.3f}" for value in measures)
            lines.append(
                f"| {index.size} | {index.values} | {mebibytes:.0f} | {index.seconds:.1f} | {name} | "
                f"{found.difference:.3f} | {shown} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(compare(open_run(options.run), options.sizes))


if __name__ == "__main__":
    main()
