"""The stages that index the regions by sketches, and measure how far the index can be trusted.

``sketches.zarr`` (documented here, its owner) holds a group ``size_N`` a sketch size, in it a group a checkpoint,
``epoch_NN``, and in it an array for each query set: (slice, class, sketch), float32. Indexes of several sizes stand
side by side; none changes the tensor, so that a finished run can be indexed at any time. The projections follow from
the run's seed, the checkpoint and the names and shapes of the parameters.

``tables/sketch_agreement_N.parquet`` holds what an index of size N is worth, measured on the run's own tensor: a row a
query set and class with the relative difference, the rank correlations and the overlaps of `agreement`. The influence
of a train region on itself is left out of its row, as it is of rankings.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.agreement import measure_agreement
from ray_tracin.attribution import ShardDifferentiator, needed_sets, region_exists, row_format
from ray_tracin.influence import sum_checkpoints, train_columns, without_absent
from ray_tracin.layers import Layout
from ray_tracin.runs import Run
from ray_tracin.sketches import Sketcher, estimate_kernel
from ray_tracin.stages import Result, Stage
from ray_tracin.vocabulary import GradientShard, QuerySet, checkpoint_name, ranges

INDEXED_SLICES = 32
"""Slices of a chunk of ``sketches.zarr``."""
SKETCHES_STAGE, AGREEMENT_STAGE = "sketches", "sketch-agreement"


def sketches_path(size: int, epoch: int, query_set: QuerySet) -> str:
    """Where the sketches of a query set at a checkpoint are."""
    return f"{paths.SKETCHES}/size_{size}/{checkpoint_name(epoch)}/{query_set}"


def agreement_path(size: int) -> str:
    """Where the measured agreement of an index is."""
    return f"tables/sketch_agreement_{size}.parquet"


def indexed_sizes(run: Run) -> tuple[int, ...]:
    """The sizes of the indexes that were begun, ascending."""
    receipts = run.store.objects.sizes(paths.RECEIPTS)
    found = (re.match(rf"{paths.RECEIPTS}/{SKETCHES_STAGE}-(\d+)/", path) for path in receipts)
    return tuple(sorted({int(match[1]) for match in found if match}))


def sketcher(run: Run, layout: Layout, epoch: int, size: int) -> Sketcher:
    """The projections of a checkpoint. Every checkpoint has its own, so that their errors don't add up."""
    return Sketcher(layout, size, f"{run.config.seed}/{checkpoint_name(epoch)}")


@dataclass(frozen=True)
class IndexSketches(Stage[GradientShard]):
    """Differentiate the regions of the run's query sets again, and keep their sketches."""

    size: int
    uses_gpu: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """One stage a size: indexes of several sizes are done independently."""
        return f"{SKETCHES_STAGE}-{self.size}"

    def keys(self) -> Sequence[GradientShard]:
        """A range of slices each."""
        return [
            GradientShard(epoch, name, start, stop)
            for epoch in self.run.config.influence_epochs()
            for name in needed_sets(self.run)
            for start, stop in ranges(len(self.run.query_slices(name)), INDEXED_SLICES)
        ]

    def write_layout(self) -> None:
        """Create the arrays of every influence checkpoint."""
        run, classes = self.run, len(self.run.classes)
        epochs = run.config.influence_epochs()
        values = sketcher(run, row_format(run).layout, epochs[0], self.size).values
        for epoch in epochs:
            for name in needed_sets(run):
                rows = run.query_slices(name)
                run.store.create_array(
                    sketches_path(self.size, epoch, name),
                    shape=(len(rows), classes, values),
                    chunks=(INDEXED_SLICES, classes, values),
                    dtype="float32",
                    dimensions=("slice", "class", "sketch"),
                    attributes={"slices": list(rows), "size": self.size},
                )

    def open(self) -> Callable[[GradientShard], Result]:
        """Differentiate the slices of a key, project, write."""
        return _IndexWork(self.run, self.size)


class _IndexWork:
    """Makes packed rows as gradient shards are made, and projects them."""

    def __init__(self, run: Run, size: int) -> None:
        self._run, self._size = run, size
        self._make = ShardDifferentiator(run)
        self._form = row_format(run)

    def __call__(self, key: GradientShard) -> Result:
        rows, regions = self._make(key)
        project = sketcher(self._run, self._form.layout, key.epoch, self._size).sketch
        values = project(self._form.rows(rows)).cpu().numpy()
        path = sketches_path(self._size, key.epoch, key.query_set)
        self._run.store.write(path, (slice(key.start, key.stop),), values)
        return {"regions": regions}


@dataclass(frozen=True)
class MeasureSketches(Stage[str]):
    """Compare what an index says with the run's own tensor: ``tables/sketch_agreement_N.parquet``."""

    size: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """One stage a size, as the index."""
        return f"{AGREEMENT_STAGE}-{self.size}"

    def keys(self) -> Sequence[str]:
        """One key: the table is written whole."""
        return ["agreement"]

    def open(self) -> Callable[[str], Result]:
        """Multiply the index with itself, a query set after the other."""
        torch.set_num_threads(self.run.config.resources.threads)

        def measure(_: str) -> Result:
            rows = [row for name in self.run.query_sets for row in self._rows(name)]
            self.run.write_table(agreement_path(self.size), pd.DataFrame(rows))
            return {"rows": len(rows)}

        return measure

    def _rows(self, query_set: QuerySet) -> list[dict[str, Any]]:
        run = self.run
        exact = torch.from_numpy(run.store.read(f"{paths.INFLUENCE}/{query_set}"))
        estimate = self._estimate(query_set)
        found = []
        for position in range(len(run.classes)):
            reference = exact[position].clone()
            if query_set == "train":
                reference[:, position * len(reference) : (position + 1) * len(reference)].fill_diagonal_(torch.nan)
            if not any(len(row[~row.isnan()].unique()) > 1 for row in reference):
                continue  # No query has a region of this class.
            agreement = measure_agreement(estimate[position], reference)
            found.append({"query_set": query_set, "query_class": position + 1, **asdict(agreement)})
        return found

    def _estimate(self, query_set: QuerySet) -> Tensor:
        run, kernels = self.run, []
        rows = run.query_slices(query_set)
        for epoch in run.config.influence_epochs():
            query = torch.from_numpy(run.store.read(sketches_path(self.size, epoch, query_set)))
            exists = torch.from_numpy(region_exists(run, rows, epoch))
            kernels.append(indexed_kernel(run, self.size, epoch, query, exists))
        return sum_checkpoints(torch.stack(kernels), run.learning_rates)


def indexed_kernel(run: Run, size: int, epoch: int, query: Tensor, exists: Tensor) -> Tensor:
    """The estimated kernel (class, query, column) of sketches (query, class, sketch) and the indexed train regions.

    NaN where a region doesn't exist; ``exists`` (query, class) says it of the queries.
    """
    train = torch.from_numpy(run.store.read(sketches_path(size, epoch, "train")))
    train_exists = torch.from_numpy(region_exists(run, run.train_slices, epoch))
    return train_columns(without_absent(estimate_kernel(query, train), exists, train_exists))
