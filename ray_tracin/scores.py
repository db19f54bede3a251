"""A stripe of the finished tensor as scores of its queries, with what its columns stand for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.assembly import train_regions
from ray_tracin.explainers import cosine_influence, gradient_norms, without_self, without_zeros
from ray_tracin.runs import Run
from ray_tracin.vocabulary import QuerySet, Stripe


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
    classes: npt.NDArray[np.int8]
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
        rates = run.store.attributes(paths.INFLUENCE)["learning_rates"]
        self._rates = torch.tensor(rates, dtype=torch.float64)
        self._norms = {name: self._norms_of(name) for name in run.query_sets}

    def _norms_of(self, query_set: QuerySet) -> Tensor:
        """The gradient norms of a query set's regions (class, query)."""
        return gradient_norms(
            torch.from_numpy(self._run.store.read(f"{paths.INFLUENCE}/norm2_{query_set}")), self._rates
        )

    def read(self, key: Stripe) -> Iterator[ClassScores]:
        """The scores of a stripe, a class at a time."""
        array = self._run.influence(key.query_set)
        whole = (slice(0, array.shape[0]), slice(key.start, key.stop), slice(0, array.shape[2]))
        stripe = torch.from_numpy(self._run.store.read(f"{paths.INFLUENCE}/{key.query_set}", whole))
        for position, influence in enumerate(stripe):
            yield self._scores(key, position + 1, influence)

    def _scores(self, key: Stripe, query_class: int, influence: Tensor) -> ClassScores:
        if key.query_set == "train":
            influence = without_self(influence, query_class, key.start, len(self._run.train_slices))
        norms = self._norms[key.query_set][query_class - 1, key.start : key.stop]
        # The norms of train regions are known where these are queries too.
        train = self._norms["train"].flatten() if "train" in self._norms else None
        cosine = torch.full_like(influence, torch.nan) if train is None else cosine_influence(influence, norms, train)
        by_cosine = self._run.config.explainers.score == "cosine"
        return ClassScores(query_class, influence, cosine, without_zeros(cosine if by_cosine else influence))


def patients_of(run: Run, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.object_]:
    """The patient of each row of ``slices.zarr``."""
    patients = run.slices.set_index("slice")["patient"]
    return np.asarray(patients.reindex(rows).to_numpy(), dtype=object)
