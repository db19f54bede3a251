"""The finished tensor as others read it: a stripe as scores, what its columns stand for, the whole in small."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.assembly import train_regions
from ray_tracin.explainers import cosine_influence, gradient_norms, without_self, without_zeros
from ray_tracin.runs import Run
from ray_tracin.store import Array
from ray_tracin.vocabulary import QuerySet, Stripe, ranges


@dataclass(frozen=True)
class ClassScores:
    """The scores of a stripe's query regions of one class: (query, train column), NaN for no region and the own one."""

    query_class: int
    influence: Tensor
    cosine: Tensor
    ranked: Tensor
    """One of the two, what ranks; NaN where every influence on a query is 0."""

    @property
    def queries(self) -> int:
        """How many of the regions exist and are influenced by another one."""
        return int((~self.ranked.isnan()).any(1).sum())


@dataclass(frozen=True)
class TrainRegions:
    """What is behind the columns of the tensor: slice, class and patient of every train region."""

    slices: npt.NDArray[np.int32]
    classes: npt.NDArray[np.int32]
    patients: npt.NDArray[np.object_]
    names: npt.NDArray[np.object_]
    """The patients, sorted, once each."""
    patient_of: Tensor
    """Position in ``names``."""

    @classmethod
    def of(cls, run: Run) -> "TrainRegions":
        """Those of a run."""
        slices, classes = train_regions(run)
        patients = patients_of(run, slices)
        names, codes = np.unique(patients, return_inverse=True)
        return cls(slices, classes, patients, names, torch.from_numpy(codes))


class StripeReader:
    """Reads a stripe's influence, and makes cosines of it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._norms = {name: region_norms(run, name) for name in run.query_sets}
        self._train_norm = train_norm(run)

    def read(self, key: Stripe) -> Iterator[ClassScores]:
        """The scores of a stripe, a class at a time."""
        where = (slice(0, len(self._run.classes)), slice(key.start, key.stop))
        stripe = torch.from_numpy(self._run.store.read(f"{paths.INFLUENCE}/{key.query_set}", where))
        for position, influence in enumerate(stripe):
            yield self._scores(key, position + 1, influence)

    def _scores(self, key: Stripe, query_class: int, influence: Tensor) -> ClassScores:
        if key.query_set == "train":
            influence = without_self(influence, query_class, key.start, len(self._run.train_slices))
        norms = self._norms[key.query_set][query_class - 1, key.start : key.stop]
        return class_scores(self._run, query_class, influence, norms, self._train_norm)


def class_scores(
    run: Run, query_class: int, influence: Tensor, query_norm: Tensor, train_norm: Tensor | None
) -> ClassScores:
    """The scores of queries of a class; ``explainers.score`` says which ranks. No train norms, no cosine: NaN."""
    absent = torch.full_like(influence, torch.nan)
    cosine = absent if train_norm is None else cosine_influence(influence, query_norm, train_norm)
    ranks = cosine if run.config.explainers.score == "cosine" else influence
    return ClassScores(query_class, influence, cosine, without_zeros(ranks))


def train_norm(run: Run) -> Tensor | None:
    """The gradient norm of every train column; None where train regions are no queries, and it is unknown."""
    return region_norms(run, "train").flatten() if "train" in run.query_sets else None


def region_norms(run: Run, query_set: QuerySet) -> Tensor:
    """The gradient norms of a query set's regions over the checkpoints, (class, query)."""
    norm2 = torch.from_numpy(run.store.read(f"{paths.INFLUENCE}/norm2_{query_set}"))
    return gradient_norms(norm2, run.learning_rates)


def patients_of(run: Run, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.object_]:
    """The patient of each row of ``slices.zarr``."""
    patients = run.slices.set_index("slice")["patient"]
    return np.asarray(patients.reindex(rows).to_numpy(), dtype=object)


def overlap_of(run: Run, slices: npt.NDArray[np.int32], classes: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """The overlap of each region; NaN where it doesn't exist."""
    overlap = run.table("regions").set_index(["slice", "class"])["overlap"]
    return overlap.reindex(pd.MultiIndex.from_arrays([slices, classes])).to_numpy(dtype=float)


@dataclass(frozen=True)
class Cells:
    """The train-influence tensor as a matrix of class blocks, in cells of pairs, float64 (row, column)."""

    block: int
    """Regions of a side of a cell, fewer at the end of a class: cells don't cross its border."""
    mean: Array
    """NaN where no pair of regions is, as ``low`` and ``high``."""
    low: Array
    high: Array
    pairs: Array
    """How many there are."""


def train_cells(run: Run, most: int) -> Cells:
    """The matrix in at most so many rows of cells, about; a row of cells is read at a time."""
    n, classes = len(run.train_slices), len(run.classes)
    block = max(1, -(-classes * n // most))
    starts = [first for first, _ in ranges(n, block)]
    rows = []
    for position in range(classes):
        for start, stop in ranges(n, block):
            selection = (slice(position, position + 1), slice(start, stop))
            part = run.store.read(f"{paths.INFLUENCE}/train", selection)[0].astype(np.float64)
            rows.append(_row_of_cells(part.reshape(stop - start, classes, n), starts))
    return Cells(block, *(np.stack(parts) for parts in zip(*rows, strict=True)))


def _row_of_cells(part: Array, starts: Sequence[int]) -> tuple[Array, Array, Array, Array]:
    """Mean, smallest, largest and number of the influences (query, train_class, train) of each cell."""

    def reduced(operation: np.ufunc, values: Array) -> Array:
        cells: Array = operation.reduceat(operation.reduce(values, axis=0), starts, axis=1)
        return cells.ravel()

    pairs = reduced(np.add, (~np.isnan(part)).astype(np.int64))
    total = reduced(np.add, np.where(np.isnan(part), 0, part))
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, which is what a cell without a pair is.
        return total / pairs, reduced(np.fmin, part), reduced(np.fmax, part), pairs
