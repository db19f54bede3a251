"""The local explanation of one region, read from a finished run: proponents, neutral regions, opponents, features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ray_tracin.assembly import train_regions
from ray_tracin.explainers import above_zero, first_places
from ray_tracin.explaining import SIDES, known_globals
from ray_tracin.features import similarity
from ray_tracin.featuring import MAXIMA, predictive_features
from ray_tracin.runs import Run
from ray_tracin.scores import ClassScores, StripeReader, overlap_of
from ray_tracin.store import IncompleteRunError
from ray_tracin.vocabulary import QuerySet, Stripe, UsageError

LOW_OVERLAP = 0.1
"""Below this share of a region in its ground truth its Dice and the gradient of it are near zero whatever is wrong."""


@dataclass(frozen=True)
class RegionExplanation:
    """Why the network predicts this region: who pushed it there, who pushed against, and through which features.

    A row of ``proponents``, ``neutral`` and ``opponents`` is a train region: rank, influence, cosine, patient, index,
    class_name, class_id, slice, overlap, is_global, and ``feature_K`` for every one of ``features``, the similarity of
    the two regions in feature K (eq. 7). Proponents come most influential first; neutral regions nearest to 0 first.
    ``rank`` is that among all train regions, global explainers (``global_explainers`` of them) included, whether or not
    they are in the lists; a region is not in its own lists. Those that have hardly a gradient are not among the
    neutral, nor counted in their ranks (`neutrality`).
    """

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
    ranked_by: str
    """``raw`` influence or ``cosine``."""
    proponents: pd.DataFrame
    neutral: pd.DataFrame
    opponents: pd.DataFrame
    features: tuple[int, ...]
    """The predictive features of the class (pooled ranking), most important at the first proponent first."""
    global_explainers: int
    """How many train regions are global explainers for queries of the class."""
    read_with: str = ""
    """The warnings that the patient was read with."""
    missing: tuple[str, ...] = ()
    """What this run has not computed yet, and the explanation lacks."""
    whole_slice: bool = False
    """Whether the Dice of the whole slice was differentiated; ``pixels``, ``overlap`` and ``dice`` are the region's."""

    @property
    def rankings(self) -> dict[str, pd.DataFrame]:
        """The three tables by what their regions are."""
        return {"proponent": self.proponents, "neutral": self.neutral, "opponent": self.opponents}

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the table."""
        found = [*self.missing, *([f"read with a warning: {self.read_with}"] if self.read_with else [])]
        if self.proponents.empty and self.opponents.empty:
            found.append("nothing to rank: every influence on this region is 0 or left out")
        if self.pixels == 0 and not self.whole_slice:
            found.append(
                "the checkpoints predict this region, the final network doesn't (regions.source=checkpoint): the "
                "influence is theirs, and there are no pixels, overlap or Dice"
            )
        if not self.labelled:
            found.append("this slice has no ground truth: the network's own prediction stands in for it")
        elif self.overlap < LOW_OVERLAP and not self.whole_slice:
            found.append(
                f"only {self.overlap:.0%} of the region is {self.class_name} in the ground truth: its score and "
                "gradient are near zero, and the ranking says little"
            )
        return found

    def links(self, line: Mapping[Any, Any], count: int) -> list[tuple[int, float]]:
        """The features in which query and a row's train region agree most, and how much (eq. 7); undefined left out."""
        found = [(feature, float(line[f"feature_{feature}"])) for feature in self.features]
        return sorted((pair for pair in found if not np.isnan(pair[1])), key=lambda pair: -pair[1])[:count]


def explain_region(
    run: Run, patient: str, index: int, class_name: str, k: int = 10, *, keep_global: bool = False
) -> RegionExplanation:
    """The k strongest proponents and opponents, and the k most neutral, of a region (patient or case, slice, class).

    Proponents are above 0 and opponents below, so there may be fewer; tables of rankings hold the first ones anyway.
    Global explainers, which explain everything alike, are left out unless ``keep_global``.

    Raises:
        UsageError: there is no such class, slice or region; what there is, is listed.
        IncompleteRunError: the tensor is not computed yet.
    """
    class_id = _class_id(run, class_name)
    row = _slice_row(run, patient, index)
    query_set, position = _query_position(run, row)
    table = run.table("regions")
    region = table[(table["slice"] == row) & (table["class"] == class_id)].iloc[0]
    scores = query_scores(run, query_set, position, class_id)
    if bool(scores.influence.isnan().all()):
        raise UsageError(_no_region(run, row, class_name))
    is_global, features, missing = _context(run, class_id)
    left_out = torch.zeros_like(is_global) if keep_global else is_global
    keys = {side: above_zero(sign * scores.ranked) for side, sign in SIDES.items()}
    keys["neutral"] = neutrality(run, scores.ranked)
    lists = {name: first_places(key, left_out, k) for name, key in keys.items()}
    rows = {name: _ranking(run, scores, *found, is_global) for name, found in lists.items()}
    about = region_features(run, row, class_id, features)
    mine = run.slices.set_index("slice").loc[row]
    return RegionExplanation(
        patient=str(mine["patient"]),
        index=index,
        class_name=class_name,
        slice=row,
        class_id=class_id,
        query_set=query_set,
        labelled=bool(region["labelled"]),
        pixels=int(region["pixels"]),
        overlap=float(region["overlap"]),
        dice=float(region["dice"]),
        ranked_by=run.config.explainers.score,
        **{name: _with_links(run, ranking, about, features) for name, ranking in rows.items()},
        features=features,
        global_explainers=int(is_global.sum()),
        read_with=str(mine["warnings"]),
        missing=missing,
        whole_slice=run.config.gradients.score == "image",
    )


def query_scores(run: Run, query_set: QuerySet, position: int, class_id: int) -> ClassScores:
    """Influence and cosine of every train region on the region of one class and one slice of a query set."""
    found = list(StripeReader(run).read(Stripe(query_set, position, position + 1)))
    return found[class_id - 1]


def neutrality(run: Run, score: Float[Tensor, "query column"]) -> Float[Tensor, "query column"]:
    """What ranks the neutral regions of a query, nearest to 0 first; NaN where a train region has hardly a gradient.

    It has hardly an influence on anyone, and is nobody's neutral example: a region of low overlap. Where whole slices
    are differentiated the overlap says nothing; there it is one of influence 0, of a slice without the class.
    """
    if run.config.gradients.score == "image":
        return -score.abs().masked_fill(score == 0, torch.nan)
    low = torch.from_numpy(overlap_of(run, *train_regions(run)) < LOW_OVERLAP)
    return -score.abs().masked_fill(low, torch.nan)


def region_features(run: Run, row: int, class_id: int, features: Sequence[int]) -> Tensor:
    """The maxima of some features in a region; NaN where there is none."""
    if not features:
        return torch.empty(0)
    maxima = run.store.read(MAXIMA, (slice(row, row + 1), slice(class_id - 1, class_id)))
    return torch.from_numpy(maxima[0, 0, list(features)])


def _context(run: Run, class_id: int) -> tuple[Tensor, tuple[int, ...], tuple[str, ...]]:
    """Who is global for queries of the class, its predictive features, and what of these is not known yet."""
    is_global, missing = known_globals(run)
    features: tuple[int, ...] = ()
    try:
        features = predictive_features(run, class_id)
    except IncompleteRunError:
        missing += (f"predictive features are not known yet: `ray-tracin features --run {run.uri}` finds them",)
    return is_global[class_id - 1], features, missing


def _with_links(run: Run, ranking: pd.DataFrame, query: Tensor, features: Sequence[int]) -> pd.DataFrame:
    lines = zip(ranking["slice"], ranking["class_id"], strict=True)
    maxima = run.store.objects.parallel(lambda one: region_features(run, int(one[0]), int(one[1]), features), lines)
    links = similarity(query, torch.stack(maxima)) if maxima else torch.empty(0, len(features))
    return ranking.assign(**{f"feature_{k}": links[:, place].numpy() for place, k in enumerate(features)})


def _class_id(run: Run, class_name: str) -> int:
    if class_name not in run.classes:
        raise UsageError(f"no class {class_name!r}; classes of this run: {', '.join(run.classes)}")
    return run.classes.index(class_name) + 1


def _slice_row(run: Run, patient: str, index: int) -> int:
    mine = run.slices_of(patient)
    chosen = mine.loc[mine["index"] == index, "slice"]
    if len(chosen) != 1:
        there = "; ".join(f"{', '.join(map(str, group['index']))} of {case}" for case, group in mine.groupby("case"))
        found = "several slices" if len(chosen) else "no slice"
        raise UsageError(f"{patient} has {found} at index {index}; there are {there}: give one, and the case")
    return int(chosen.iloc[0])


def _query_position(run: Run, row: int) -> tuple[QuerySet, int]:
    for query_set in run.query_sets:
        rows = run.query_slices(query_set)
        if row in rows:
            return query_set, rows.index(row)
    mine = run.slices.set_index("slice").loc[row]
    raise UsageError(
        f"{mine['case']} is a {mine['split']} case, and this run explains the {' and '.join(run.query_sets)} slices "
        "alone (split, influence.query_sets): `ray-tracin query` explains any scan"
    )


def _no_region(run: Run, row: int, class_name: str) -> str:
    table = run.table("regions")
    there = table[(table["slice"] == row) & (table["pixels"] > 0)]["class"].tolist()
    if run.classes.index(class_name) + 1 in there:
        return (
            f"the final network predicts {class_name} on this slice, but not all of its checkpoints do "
            f"(regions.source is {run.config.regions.source}), so that this region has no influence; "
            "`pixels_epoch_NN` in regions.parquet says which"
        )
    names = ", ".join(run.classes[class_id - 1] for class_id in there) or "none"
    threshold = run.config.regions.threshold
    return (
        f"the network predicts no {class_name} with more than {threshold:.0%} confidence on this slice, "
        f"so there is nothing to explain; regions that exist: {names}"
    )


def _ranking(run: Run, scores: ClassScores, columns: Tensor, ranks: Tensor, is_global: Tensor) -> pd.DataFrame:
    train_slices, train_classes = (values[columns.numpy()] for values in train_regions(run))
    slices = run.slices.set_index("slice").reindex(train_slices)
    return pd.DataFrame(
        {
            "rank": ranks.numpy(),
            "influence": scores.influence[0, columns].numpy(),
            "cosine": scores.cosine[0, columns].numpy(),
            "patient": slices["patient"].to_numpy(),
            "index": slices["index"].to_numpy(),
            "class_name": [run.classes[int(class_id) - 1] for class_id in train_classes],
            "class_id": train_classes,
            "slice": train_slices,
            "overlap": overlap_of(run, train_slices, train_classes),
            "is_global": is_global[columns].numpy(),
        }
    )
