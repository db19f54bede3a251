"""The local explanation of one region: its proponents and opponents, read from a finished tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ray_tracin import store as paths
from ray_tracin.assembly import train_regions
from ray_tracin.influence import rank_influence
from ray_tracin.runs import Run
from ray_tracin.vocabulary import QuerySet

LOW_OVERLAP = 0.1
"""Below this share of a region in its ground truth its Dice and the gradient of it are near zero whatever is wrong."""


@dataclass(frozen=True)
class RegionExplanation:
    """Why the network predicts this region: the train regions that pushed it there, and those that pushed against."""

    patient: str
    index: int
    class_name: str
    slice: int
    """Row of ``slices.zarr``."""
    class_id: int
    query_set: QuerySet
    labelled: bool
    """Whether the slice has ground truth; without it the network's own prediction stands in."""
    pixels: int
    overlap: float
    dice: float
    proponents: pd.DataFrame
    """rank, influence, patient, index, class_name, class_id, slice, overlap; most influential first."""
    opponents: pd.DataFrame

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the table."""
        found = []
        if not self.labelled:
            found.append("this slice has no ground truth: the network's own prediction stands in for it")
        elif self.overlap < LOW_OVERLAP:
            found.append(
                f"only {self.overlap:.0%} of the region is {self.class_name} in the ground truth: its score and "
                "gradient are near zero, and the ranking says little"
            )
        return found


def explain_region(run: Run, patient: str, index: int, class_name: str, k: int = 10) -> RegionExplanation:
    """The k strongest proponents and opponents of a region (patient or case, slice position, class).

    Raises:
        ValueError: there is no such class, slice or region; what there is, is listed.
        IncompleteRunError: the tensor is not computed yet.
    """
    class_id = _class_id(run, class_name)
    row = _slice_row(run, patient, index)
    query_set, position = _query_position(run, row)
    table = run.table("regions")
    region = table[(table["slice"] == row) & (table["class"] == class_id)].iloc[0]
    selection = (slice(class_id - 1, class_id), slice(position, position + 1), slice(0, len(train_regions(run)[0])))
    influence = torch.from_numpy(run.store.read(f"{paths.INFLUENCE}/{query_set}", selection)[0, 0])
    if bool(influence.isnan().all()):
        raise ValueError(_no_region(run, row, class_name))
    best, worst = rank_influence(influence, k)
    return RegionExplanation(
        patient=str(run.slices.set_index("slice").loc[row, "patient"]),
        index=index,
        class_name=class_name,
        slice=row,
        class_id=class_id,
        query_set=query_set,
        labelled=bool(region["labelled"]),
        pixels=int(region["pixels"]),
        overlap=float(region["overlap"]),
        dice=float(region["dice"]),
        proponents=_ranking(run, influence, best.tolist()),
        opponents=_ranking(run, influence, worst.tolist()),
    )


def _class_id(run: Run, class_name: str) -> int:
    if class_name not in run.classes:
        raise ValueError(f"no class {class_name!r}; classes of this run: {', '.join(run.classes)}")
    return run.classes.index(class_name) + 1


def _slice_row(run: Run, patient: str, index: int) -> int:
    table = run.slices
    mine = table[(table["patient"] == patient) | (table["case"] == patient)]
    if mine.empty:
        near = sorted(set(table["patient"]))
        raise ValueError(f"no patient {patient!r} in this run; there are {len(near)}, such as {', '.join(near[:5])}")
    chosen = mine.loc[mine["index"] == index, "slice"]
    if len(chosen) != 1:
        positions = ", ".join(f"{case}: {list(group['index'])}" for case, group in mine.groupby("case"))
        raise ValueError(f"patient {patient} has {len(chosen)} slices at index {index}; slices are at {positions}")
    return int(chosen.iloc[0])


def _query_position(run: Run, row: int) -> tuple[QuerySet, int]:
    for query_set in run.query_sets:
        rows = run.query_slices(query_set)
        if row in rows:
            return query_set, rows.index(row)
    raise ValueError(f"slice {row} is in none of the query sets of this run: {', '.join(run.query_sets)}")


def _no_region(run: Run, row: int, class_name: str) -> str:
    table = run.table("regions")
    there = table[(table["slice"] == row) & (table["pixels"] > 0)]["class"]
    names = ", ".join(run.classes[class_id - 1] for class_id in there) or "none"
    threshold = run.config.regions.threshold
    return (
        f"the network predicts no {class_name} with more than {threshold:.0%} confidence on this slice, "
        f"so there is nothing to explain; regions that exist: {names}"
    )


def _ranking(run: Run, influence: torch.Tensor, columns: Sequence[int]) -> pd.DataFrame:
    train_slices, train_classes = (values[list(columns)] for values in train_regions(run))
    slices = run.slices.set_index("slice").reindex(train_slices)
    regions = run.table("regions").set_index(["slice", "class"])
    found = regions.reindex(pd.MultiIndex.from_arrays([train_slices, train_classes]))
    return pd.DataFrame(
        {
            "rank": np.arange(1, len(columns) + 1),
            "influence": influence[list(columns)].numpy(),
            "patient": slices["patient"].to_numpy(),
            "index": slices["index"].to_numpy(),
            "class_name": [run.classes[int(class_id) - 1] for class_id in train_classes],
            "class_id": train_classes,
            "slice": train_slices,
            "overlap": found["overlap"].to_numpy(),
        }
    )
