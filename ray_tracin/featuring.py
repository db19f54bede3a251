"""The stages that say what latent features explain: their maxima, their importance along rankings, their impact.

``features.zarr`` (documented here, its owner) holds ``maxima`` (slice, class, feature): the maximum of every map of the
final network's last hidden layer over every region of the final network, NaN where there is no region. ``sums`` and
``counts`` (stripe, query_class, feature, place) are the parts of eq. 8 that the stripes of the test queries add. The
places are those of ``C + 1`` rankings, one behind the other: the pooled one of all C·n train regions, then the ranking
of each train class, n places each.

Features, in arrays and tables, are numbered from 0, as the channels of the head's kernel. Train class 0 is the pooled
ranking. The rankings are by raw influence, whatever ranks the regions (``explainers.score``); ``ranked_by`` of the
tables says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.assembly import AssembleStripes
from ray_tracin.config import FeaturesConfig
from ray_tracin.devices import pick_device
from ray_tracin.explainers import without_zeros
from ray_tracin.explaining import global_columns
from ray_tracin.features import classify_trend, importance_sums, is_predictive, region_maxima
from ray_tracin.mapping import PREDICTED_SLICES, REGION_SLICES, slice_ranges
from ray_tracin.runs import FINAL, Run
from ray_tracin.stages import Result, Stage
from ray_tracin.store import Array
from ray_tracin.unet import HEAD, last_hidden_maps
from ray_tracin.vocabulary import SliceRange, Stripe, ranges

MAXIMA = f"{paths.FEATURES}/maxima"
SUMS = f"{paths.FEATURES}/sums"
COUNTS = f"{paths.FEATURES}/counts"
CHUNK_VALUES = 1 << 21
"""Values of one chunk of the sums: bounds what a worker holds, however many train slices there are."""
RANKED_BY = "raw"
POOLED = 0
"""The train class of the ranking over all train classes."""


def feature_count(run: Run) -> int:
    """The feature maps of the last hidden layer: what the head of the final network reads."""
    return int(run.model(FINAL).get_parameter(f"{HEAD}.weight").shape[1])


def pooled(run: Run, name: str) -> pd.DataFrame:
    """What a table of features says of the rankings over all train classes."""
    table = run.table(name)
    return table[table["train_class"] == POOLED]


def predictive_features(run: Run, class_id: int) -> tuple[int, ...]:
    """The predictive features of a class by its pooled ranking, most important at the first proponent first.

    None without test queries: then nothing is known of them.

    Raises:
        IncompleteRunError: they are not measured yet.
    """
    if "test" not in run.query_sets:
        return ()
    trends = pooled(run, "feature_trends")
    mine = trends[(trends["query_class"] == class_id) & trends["predictive"]]
    ordered = mine.sort_values("importance_first", ascending=False, kind="stable")
    return tuple(int(feature) for feature in ordered["feature"])


@dataclass(frozen=True)
class MapFeatures(Stage[SliceRange]):
    """Take the maximum of every last hidden feature map over every region: ``features.zarr/maxima``."""

    name: ClassVar[str] = "features"
    uses_gpu: ClassVar[bool] = True

    def keys(self) -> Sequence[SliceRange]:
        """Ranges of all slices, as their regions were mapped."""
        return slice_ranges(self.run)

    def write_layout(self) -> None:
        """Create the array."""
        run, features = self.run, feature_count(self.run)
        run.store.create_group(paths.FEATURES, {"network": FINAL, "layer": HEAD, "classes": list(run.classes)})
        run.store.create_array(
            MAXIMA,
            shape=(len(run.slices), len(run.classes), features),
            chunks=(REGION_SLICES, len(run.classes), features),
            dtype="float32",
            dimensions=("slice", "class", "feature"),
        )

    def open(self) -> Callable[[SliceRange], Result]:
        """Run the final network over a range of slices."""
        run = self.run
        torch.set_num_threads(run.config.resources.threads)
        device = pick_device(run)
        network = run.model(FINAL).to(device)

        def take(key: SliceRange) -> Result:
            images = torch.from_numpy(run.images(range(key.start, key.stop)))
            where = (slice(key.start, key.stop),)
            masks = torch.from_numpy(run.store.read(paths.MASKS, where))
            parts = []
            with torch.inference_mode():
                for batch, mask in zip(images.split(PREDICTED_SLICES), masks.split(PREDICTED_SLICES), strict=True):
                    _, maps = last_hidden_maps(network, HEAD, batch.to(device))
                    parts.append(region_maxima(maps.float(), mask.to(device)).cpu())
            run.store.write(MAXIMA, where, torch.cat(parts).numpy())
            return {}

        return take


@dataclass(frozen=True)
class RankFeatures(Stage[Stripe]):
    """Add up the similarities of a stripe's queries at every rank (eq. 8): ``sums`` and ``counts``.

    Each query class leaves its global explainers out of the rankings.
    """

    name: ClassVar[str] = "feature-sums"

    def keys(self) -> Sequence[Stripe]:
        """The stripes of the test queries, where there are any."""
        return [key for key in AssembleStripes(self.run).keys() if key.query_set == "test"]  # noqa: SIM118

    def write_layout(self) -> None:
        """Create the arrays."""
        run, classes, features = self.run, len(self.run.classes), self.run.store.array(MAXIMA).shape[2]
        places = _places(run)[-1].stop
        for path, dtype in ((SUMS, "float64"), (COUNTS, "int64")):
            run.store.create_array(
                path,
                shape=(len(self.keys()), classes, features, places),
                chunks=(1, 1, _chunk_features(places, features), places),
                dtype=dtype,
                dimensions=("stripe", "query_class", "feature", "place"),
            )

    def open(self) -> Callable[[Stripe], Result]:
        """Read what the stripes share: the maxima, and who is left out."""
        return _StripeSums(self.run)


def _places(run: Run) -> list[slice]:
    """The places of every ranking: the pooled one, then each train class's."""
    n, everything = len(run.train_slices), len(run.classes) * len(run.train_slices)
    own = [slice(everything + start, everything + stop) for start, stop in ranges(everything, n)]
    return [slice(0, everything), *own]


def _chunk_features(places: int, features: int) -> int:
    return min(features, max(1, CHUNK_VALUES // places))


class _StripeSums:
    """Keeps the maxima of all regions between stripes."""

    def __init__(self, run: Run) -> None:
        torch.set_num_threads(run.config.resources.threads)
        self._run = run
        self._maxima = torch.from_numpy(run.store.read(MAXIMA))
        self._left_out = global_columns(run)

    @cached_property
    def _train(self) -> Tensor:
        """The maxima of the train columns: (column, feature)."""
        return self._maxima[list(self._run.train_slices)].transpose(0, 1).flatten(0, 1)

    def __call__(self, key: Stripe) -> Result:
        run = self._run
        selection = (slice(0, len(run.classes)), slice(key.start, key.stop))
        influence = torch.from_numpy(run.store.read(f"{paths.INFLUENCE}/{key.query_set}", selection))
        queries = self._maxima[list(run.query_slices(key.query_set)[key.start : key.stop])]
        stripe, features = key.start // run.config.influence.tile_slices, self._train.shape[1]
        places = _places(run)[-1].stop
        for position, every in enumerate(influence):
            rows = without_zeros(every)
            rows[:, self._left_out[position]] = torch.nan
            for start, stop in ranges(features, _chunk_features(places, features)):
                sums, counts = self._ranked(rows, queries[:, position, start:stop], self._train[:, start:stop])
                where = (slice(stripe, stripe + 1), slice(position, position + 1), slice(start, stop))
                run.store.write(SUMS, where, sums[None, None].numpy())
                run.store.write(COUNTS, where, counts[None, None].numpy())
        return {"left_out": self._left_out.sum(1).tolist()}

    def _ranked(self, influence: Tensor, queries: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and counts of all rankings, one behind the other."""
        n = len(self._run.train_slices)
        columns = [slice(0, len(train)), *(slice(start, stop) for start, stop in ranges(len(train), n))]
        parts = [importance_sums(influence[:, part], queries, train[part]) for part in columns]
        sums, counts = zip(*parts, strict=True)
        return torch.cat(sums, dim=1), torch.cat(counts, dim=1)


@dataclass(frozen=True)
class TabulateFeatures(Stage[str]):
    """``feature_importance.parquet`` and ``feature_trends.parquet``: eq. 8 at every rank, and how its curves go.

    Ranks that no query has are absent; a feature that is dead for a pair of classes stands in the trends alone.
    """

    name: ClassVar[str] = "feature-tables"

    def keys(self) -> Sequence[str]:
        """One key, where there are test queries: the tables are written whole."""
        return ["features"] if "test" in self.run.query_sets else []

    def open(self) -> Callable[[str], Result]:
        """Add the stripes up, and fit the trends."""

        def tabulate(_: str) -> Result:
            run = self.run
            curves: list[dict[str, Array]] = []
            trends: list[pd.DataFrame] = []
            features = run.store.array(MAXIMA).shape[2]
            for position in range(len(run.classes)):
                for start, stop in ranges(features, _chunk_features(_places(run)[-1].stop, features)):
                    sums, counts = (_over_stripes(run, path, position, start, stop) for path in (SUMS, COUNTS))
                    importance = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)
                    for train_class, places in enumerate(_places(run)):
                        about = (position + 1, train_class, start)
                        curves.append(_curve_rows(importance[:, places], counts[:, places], *about))
                        trends.append(_trend_rows(importance[:, places], run.config.features, *about))
            order = ["query_class", "train_class", "feature"]
            run.write_table(paths.FEATURE_IMPORTANCE, _joined(curves))
            table = pd.concat(trends).sort_values(order, ignore_index=True)
            run.write_table(paths.FEATURE_TRENDS, table)
            return {"predictive": int(table["predictive"].sum())}

        return tabulate


def _over_stripes(run: Run, path: str, position: int, start: int, stop: int) -> Array:
    where = (slice(position, position + 1), slice(start, stop))
    total: Array = run.store.read(path, (slice(0, 1), *where))[0, 0]
    for stripe in range(1, run.store.array(path).shape[0]):
        total = total + run.store.read(path, (slice(stripe, stripe + 1), *where))[0, 0]
    return total


def _curve_rows(
    importance: Array, counts: Array, query_class: int, train_class: int, first_feature: int
) -> dict[str, Array]:
    feature, place = np.nonzero(counts)
    return {
        "feature": (feature + first_feature).astype(np.int16),
        "query_class": np.full(len(feature), query_class, dtype=np.int32),
        "train_class": np.full(len(feature), train_class, dtype=np.int32),
        "rank": (place + 1).astype(np.int32),
        "importance": importance[feature, place],
        "queries": counts[feature, place].astype(np.int32),
    }


def _joined(parts: list[dict[str, Array]]) -> pd.DataFrame:
    """The parts one below the other; taken apart column by column, so that the rows are not held three times."""
    table = pd.DataFrame({name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])})
    # A category takes a byte a row, a word eight and more.
    table["ranked_by"] = pd.Categorical.from_codes(np.zeros(len(table), dtype=np.int8), pd.Index([RANKED_BY]))
    return table


def _trend_rows(
    importance: Array, settings: FeaturesConfig, query_class: int, train_class: int, first_feature: int
) -> pd.DataFrame:
    trends = [classify_trend(curve, settings) for curve in torch.from_numpy(importance)]
    first = importance[:, 0]
    pairs = zip(trends, first.tolist(), strict=True)
    return pd.DataFrame(
        {
            "feature": np.arange(first_feature, first_feature + len(trends), dtype=np.int16),
            "query_class": np.int32(query_class),
            "train_class": np.int32(train_class),
            "trend": [trend.kind for trend in trends],
            "slope": [trend.slope for trend in trends],
            "curvature": [trend.curvature for trend in trends],
            "importance_first": first,
            "predictive": [is_predictive(trend, value, settings) for trend, value in pairs],
            "ranked_by": RANKED_BY,
        }
    )
