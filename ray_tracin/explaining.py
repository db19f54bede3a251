"""The stages that say it of every region: global explainers, then proponents and opponents without them.

A stripe of the tensor is read at a time. First the lists of the test queries are counted (`CountLists`), which tells
the global explainers (`TabulateGlobalExplainers`); then every query region is ranked with these left out
(`RankQueries`, `RankPatients`), and the parts become the tables (`TabulateRankings`). They stay in ``explainers/``.

A train region is never in its own list: its influence on itself is in ``self_influence.parquet``. Other regions of the
same slice, and of the same patient, are. ``explainers.score`` decides which number ranks; ``ranked_by`` of every table
names it, ``influence`` and ``cosine`` hold both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.assembly import AssembleStripes, train_regions
from ray_tracin.explainers import (
    NONE,
    count_classes,
    count_lists,
    find_global,
    first_local,
    list_shares,
    local_ranks,
    rank_regions,
    sum_by_patient,
)
from ray_tracin.runs import Run
from ray_tracin.scores import ClassScores, StripeReader, TrainRegions, patients_of
from ray_tracin.stages import Result, Stage, results_of
from ray_tracin.store import IncompleteRunError
from ray_tracin.vocabulary import QuerySet, Stripe

SIDES: Mapping[str, int] = {"proponents": 1, "opponents": -1}
"""The lists of a query, and the sign that the score has in their order."""


def shares_set(run: Run) -> QuerySet:
    """The query set whose lists tell the global explainers: ``test``, as in the paper, or ``train`` without one."""
    return run.query_sets[-1]


@dataclass(frozen=True)
class CountLists(Stage[Stripe]):
    """Count in how many lists of the test queries each train region stands: parts in ``explainers/lists/``."""

    name: ClassVar[str] = "list-counts"

    def keys(self) -> Sequence[Stripe]:
        """The stripes of the query set of `shares_set`."""
        stripes = AssembleStripes(self.run).keys()
        chosen = shares_set(self.run) if stripes else None
        return [key for key in stripes if key.query_set == chosen]

    def open(self) -> Callable[[Stripe], Result]:
        """Rank the queries of a stripe, and count."""
        reader, regions = StripeReader(self.run), TrainRegions.of(self.run)

        def count(key: Stripe) -> Result:
            found = list(reader.read(key))
            frames = [self._counts(scores, regions) for scores in found]
            exists = torch.stack([(~scores.influence.isnan()).any(0) for scores in found]).any(0).numpy()
            parts = [frame[exists] for frame in frames]
            self.run.write_table(_part("lists", key), pd.concat(parts, ignore_index=True))
            return {"queries": [scores.queries for scores in found]}

        return count

    def _counts(self, scores: ClassScores, regions: TrainRegions) -> pd.DataFrame:
        length, columns = self.run.config.explainers.list_length, len(regions.slices)
        counts = {
            side: count_lists(rank_regions(sign * scores.ranked, length), columns).numpy()
            for side, sign in SIDES.items()
        }
        return pd.DataFrame(
            {
                "query_class": np.int32(scores.query_class),
                "train_class": regions.classes,
                "train_slice": regions.slices,
                **counts,
            }
        )


@dataclass(frozen=True)
class TabulateGlobalExplainers(Stage[str]):
    """``tables/global_explainers.parquet``: the shares of lists that train regions stand in, and who is global.

    A row a query class and train region that exists (has an influence on some query): ``query_set`` (whose lists are
    counted: test, or train without test queries), ``query_class``, ``train_slice``, ``train_class``, ``patient``,
    ``share_proponent``, ``share_opponent`` (of the first ``explainers.list_length`` places), ``is_global`` (a share
    above ``explainers.max_share``), ``queries`` (how many lists), ``ranked_by``. Shares are NaN, and nobody is global,
    for a class that no query has.
    """

    name: ClassVar[str] = "global-explainers"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """One key, where there are queries."""
        return ["global_explainers"] if self.run.query_sets else []

    def open(self) -> Callable[[str], Result]:
        """Add the counts of the stripes."""

        def tabulate(_: str) -> Result:
            counting = CountLists(self.run)
            found = results_of(counting)
            queries = np.sum([result["queries"] for result in found], axis=0)
            region = ["query_class", "train_class", "train_slice"]
            parts = [self.run.store.read_table(_part("lists", key)) for key in counting.keys()]  # noqa: SIM118
            counts = pd.concat(parts).groupby(region, as_index=False, sort=True)[list(SIDES)].sum()
            table = self._shares(counts, queries[counts["query_class"] - 1])
            self.run.write_table(paths.GLOBAL_EXPLAINERS, table)
            return {"global": int(table["is_global"].sum())}

        return tabulate

    def _shares(self, counts: pd.DataFrame, queries: npt.NDArray[np.int64]) -> pd.DataFrame:
        lists = torch.from_numpy(queries)
        proponent, opponent = (list_shares(torch.tensor(counts[side].to_numpy()), lists) for side in SIDES)
        is_global = find_global(proponent, opponent, self.run.config.explainers.max_share)
        return pd.DataFrame(
            {
                "query_set": shares_set(self.run),
                "query_class": counts["query_class"],
                "train_slice": counts["train_slice"],
                "train_class": counts["train_class"],
                "patient": patients_of(self.run, counts["train_slice"].to_numpy()),
                "share_proponent": proponent.numpy(),
                "share_opponent": opponent.numpy(),
                "is_global": is_global.numpy(),
                "queries": queries.astype(np.int32),
                "ranked_by": self.run.config.explainers.score,
            }
        )


def global_columns(run: Run) -> npt.NDArray[np.bool_]:
    """Which train regions are global explainers for each query class: bool (query_class, train column)."""
    table = run.store.read_table(paths.GLOBAL_EXPLAINERS)
    chosen = table[table["is_global"]]
    classes = len(run.classes)
    found = np.zeros((classes, classes * len(run.train_slices)), dtype=bool)
    found[cells_of(run, chosen)] = True
    return found


def cells_of(run: Run, table: pd.DataFrame) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the lines of a table stand in a matrix (query_class, train column): an index."""
    place = np.searchsorted(np.asarray(run.train_slices), table["train_slice"])
    column = (table["train_class"].to_numpy(dtype=np.int64) - 1) * len(run.train_slices) + place
    return table["query_class"].to_numpy(dtype=np.int64) - 1, column


def known_globals(run: Run) -> tuple[Tensor, tuple[str, ...]]:
    """`global_columns`; where they are not found yet nobody is one, and a line says so."""
    try:
        return torch.from_numpy(global_columns(run)), ()
    except IncompleteRunError:
        unknown = torch.zeros((len(run.classes), len(train_regions(run)[0])), dtype=torch.bool)
        return unknown, (f"global explainers are not known yet: `ray-tracin explainers --run {run.uri}` finds them",)


@dataclass(frozen=True)
class RankQueries(Stage[Stripe]):
    """Rank the train regions for every query region of a stripe: parts in ``explainers/``."""

    name: ClassVar[str] = "rankings"

    def keys(self) -> Sequence[Stripe]:
        """A range of queries each, as `AssembleStripes`."""
        return AssembleStripes(self.run).keys()

    def open(self) -> Callable[[Stripe], Result]:
        """Write the parts of a stripe."""
        ranker = _Ranker(self.run)

        def rank(key: Stripe) -> Result:
            frames: dict[str, list[pd.DataFrame]] = {side: [] for side in SIDES}
            class_counts = []
            for scores in ranker.reader.read(key):
                for side in SIDES:
                    lists = ranker.lists(scores, side)
                    frames[side].append(ranker.regions(key, scores, lists))
                    if side == "proponents":
                        class_counts.append(ranker.classes(scores, lists))
            _write_parts(self.run, key, frames)
            return {"class_counts": class_counts}

        return rank


@dataclass(frozen=True)
class RankPatients(Stage[Stripe]):
    """Rank the train patients for every query region of a stripe: parts in ``explainers/``."""

    name: ClassVar[str] = "patient-rankings"

    def keys(self) -> Sequence[Stripe]:
        """A range of queries each, as `AssembleStripes`."""
        return AssembleStripes(self.run).keys()

    def open(self) -> Callable[[Stripe], Result]:
        """Write the parts of a stripe."""
        ranker = _Ranker(self.run)

        def rank(key: Stripe) -> Result:
            frames: dict[str, list[pd.DataFrame]] = {f"patient_{side}": [] for side in SIDES}
            for scores in ranker.reader.read(key):
                for side in SIDES:
                    frames[f"patient_{side}"].append(ranker.patients(key, scores, side))
            _write_parts(self.run, key, frames)
            return {}

        return rank


def _write_parts(run: Run, key: Stripe, frames: Mapping[str, Sequence[pd.DataFrame]]) -> None:
    for name, parts in frames.items():
        part = pd.concat(parts).sort_values(["query_slice", "query_class", "rank"], ignore_index=True)
        run.write_table(_part(name, key), part)


class _Ranker:
    """Makes the rows of a stripe's query regions of one class."""

    def __init__(self, run: Run) -> None:
        self.reader = StripeReader(run)
        self._run = run
        self._settings = run.config.explainers
        self._regions = TrainRegions.of(run)
        self._global = torch.from_numpy(global_columns(run))
        self._labelled = run.slices.set_index("slice")["labelled"]

    def lists(self, scores: ClassScores, side: str) -> Tensor:
        """Lists that are long enough for what is left of them without global explainers (query, rank)."""
        wanted = max(self._settings.top_k, self._settings.class_list)
        length = wanted + int(self._global[scores.query_class - 1].sum())
        return rank_regions(SIDES[side] * scores.ranked, length)

    def regions(self, key: Stripe, scores: ClassScores, lists: Tensor) -> pd.DataFrame:
        """The first ``top_k`` that are no global explainers, and the global ones before them; a row an entry."""
        is_global = self._global[scores.query_class - 1]
        query, place = first_local(lists, is_global, self._settings.top_k).nonzero(as_tuple=True)
        column = lists[query, place]
        regions, columns = self._regions, column.numpy()
        return pd.DataFrame(
            {
                **self._query_columns(key, scores, query),
                "train_slice": regions.slices[columns],
                "train_class": regions.classes[columns],
                "train_patient": regions.patients[columns],
                "influence": scores.influence[query, column].numpy(),
                "cosine": scores.cosine[query, column].numpy(),
                "rank": (place + 1).numpy().astype(np.int32),
                "local_rank": local_ranks(lists, is_global)[query, place].numpy().astype(np.int32),
                "is_global": is_global[column].numpy(),
                "ranked_by": self._settings.score,
            }
        )

    def patients(self, key: Stripe, scores: ClassScores, side: str) -> pd.DataFrame:
        """The ``top_k`` patients with the largest (smallest) sums, without global explainers; a row an entry."""
        is_global, names = self._global[scores.query_class - 1], self._regions.names
        influence, cosine, ranked = (
            sum_by_patient(score, self._regions.patient_of, is_global, len(names))
            for score in (scores.influence, scores.cosine, scores.ranked)
        )
        lists = rank_regions(SIDES[side] * ranked[0], self._settings.top_k)
        query, place = (lists != NONE).nonzero(as_tuple=True)
        patient = lists[query, place]
        sums = {"influence": influence[0], "cosine": cosine[0]}
        means = {"influence_mean": influence[0] / influence[1], "cosine_mean": cosine[0] / cosine[1]}
        return pd.DataFrame(
            {
                **self._query_columns(key, scores, query),
                "train_patient": names[patient.numpy()],
                **{name: values[query, patient].numpy() for name, values in (sums | means).items()},
                "regions": ranked[1][query, patient].numpy().astype(np.int32),
                "rank": (place + 1).numpy().astype(np.int32),
                "ranked_by": self._settings.score,
            }
        )

    def classes(self, scores: ClassScores, lists: Tensor) -> list[int]:
        """How often each train class is among the first ``class_list`` that are no global explainers."""
        train_classes = torch.from_numpy(self._regions.classes.astype(np.int64))
        is_global, classes = self._global[scores.query_class - 1], len(self._run.classes)
        return count_classes(lists, is_global, train_classes, self._settings.class_list, classes).tolist()

    def _query_columns(self, key: Stripe, scores: ClassScores, query: Tensor) -> dict[str, Any]:
        rows = np.asarray(self._run.query_slices(key.query_set)[key.start : key.stop], dtype=np.int32)
        return {
            "query_set": key.query_set,
            "query_slice": rows[query.numpy()],
            "query_class": np.int32(scores.query_class),
            "query_patient": patients_of(self._run, rows)[query.numpy()],
            "query_labelled": self._labelled.reindex(rows).to_numpy(dtype=bool)[query.numpy()],
        }


PARTS = (*SIDES, *(f"patient_{side}" for side in SIDES))
"""The tables that `RankQueries` and `RankPatients` write parts of."""
CLASSES_TABLE = "proponent_classes"


@dataclass(frozen=True)
class TabulateRankings(Stage[str]):
    """The tables of all rankings.

    ``proponents.parquet`` and ``opponents.parquet``: ``query_set``, ``query_slice``, ``query_class``,
    ``query_patient``, ``query_labelled`` (false where the network's own prediction stands in for the ground truth),
    ``train_slice``, ``train_class``, ``train_patient``, ``influence``, ``cosine``, ``rank`` (among all regions),
    ``local_rank`` (among those that are no global explainers; 0 for these), ``is_global``, ``ranked_by``: for each
    query region the first ``explainers.top_k`` local ones and the global ones before them.

    ``patient_proponents.parquet`` and ``patient_opponents.parquet``: by patient, ``influence`` and ``cosine`` summed
    over the patient's ``regions`` that are no global explainers, and their means, ranked by the sum, the largest first
    and the smallest first. As with regions, an opponent is among the smallest, whether or not its sum is below 0.

    ``proponent_classes.parquet`` (figure 5): ``query_set``, ``query_class``, ``train_class``, ``count`` and ``share``
    among the first ``explainers.class_list`` local proponents; NaN for a class that no query has.

    ``cosine`` is NaN where train regions are no queries (their norms are unknown) or a gradient is 0.
    """

    name: ClassVar[str] = "ranking-tables"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """A key a table, where there are queries."""
        return [*PARTS, CLASSES_TABLE] if self.run.query_sets else []

    def open(self) -> Callable[[str], Result]:
        """Put the parts together."""

        def tabulate(name: str) -> Result:
            table = self._class_shares() if name == CLASSES_TABLE else self._joined(name)
            self.run.write_table(f"tables/{name}.parquet", table)
            return {"rows": len(table)}

        return tabulate

    def _joined(self, name: str) -> pd.DataFrame:
        keys = RankQueries(self.run).keys()
        return pd.concat([self.run.store.read_table(_part(name, key)) for key in keys], ignore_index=True)

    def _class_shares(self) -> pd.DataFrame:
        ranking, classes = RankQueries(self.run), np.arange(1, len(self.run.classes) + 1, dtype=np.int32)
        frames = []
        for query_set in self.run.query_sets:
            mine = [key.query_set == query_set for key in ranking.keys()]  # noqa: SIM118
            results = [result for result, chosen in zip(results_of(ranking), mine, strict=True) if chosen]
            counts = np.sum([result["class_counts"] for result in results], axis=0, dtype=np.int64)
            every = torch.from_numpy(counts)
            frames.append(
                pd.DataFrame(
                    {
                        "query_set": query_set,
                        "query_class": np.repeat(classes, len(classes)),
                        "train_class": np.tile(classes, len(classes)),
                        "count": counts.ravel(),
                        "share": list_shares(every, every.sum(1, keepdim=True)).flatten().numpy(),
                        "ranked_by": self.run.config.explainers.score,
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)


def _part(name: str, key: Stripe) -> str:
    return f"{paths.EXPLAINER_PARTS}/{name}/{key}.parquet"
