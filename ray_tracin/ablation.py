"""The stages that say what the prediction loses where features are masked: eq. 9 for every filter, and for sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.devices import pick_device
from ray_tracin.features import feature_sets, impacts
from ray_tracin.featuring import predictive_features
from ray_tracin.mapping import PREDICTED_SLICES, slice_ranges
from ray_tracin.runs import FINAL, Run
from ray_tracin.stages import Result, Stage, results_of
from ray_tracin.unet import HEAD, last_hidden_maps
from ray_tracin.vocabulary import SliceRange

SetName = tuple[int, str]
"""Class whose impact is measured, and name of the set."""


@dataclass(frozen=True)
class Ablate(Stage[SliceRange]):
    """Mask every feature, and every set of them, on the slices of eq. 9; sums go into the receipts.

    These are the validation slices with ground truth, or where the split has none, the test slices with it.
    """

    name: ClassVar[str] = "ablation"
    uses_gpu: ClassVar[bool] = True

    def keys(self) -> Sequence[SliceRange]:
        """Ranges of all slices, of which those are done that are ablated; ranges without one are left out."""
        found = slice_ranges(self.run)
        return [key for key in found if _ablated(self.run, key)]

    def open(self) -> Callable[[SliceRange], Result]:
        """One forward a slice serves all filters and sets."""
        run = self.run
        torch.set_num_threads(run.config.resources.threads)
        device = pick_device(run)
        network = run.model(FINAL).to(device)
        weight = network.get_parameter(f"{HEAD}.weight")
        features = int(weight.shape[1])
        sets = class_sets(run, features)
        masked = [*((feature,) for feature in range(features)), *sets.values()]

        def ablate(key: SliceRange) -> Result:
            rows = _ablated(run, key)
            images, labels = torch.from_numpy(run.images(rows)), torch.from_numpy(run.labels(rows))
            parts = []
            with torch.inference_mode():
                for batch, truth in zip(images.split(PREDICTED_SLICES), labels.split(PREDICTED_SLICES), strict=True):
                    logits, maps = last_hidden_maps(network, HEAD, batch.to(device))
                    parts.append(impacts(logits, maps, weight, truth.to(device), masked).cpu())
            return _summed(torch.cat(parts), features, list(sets))

        return ablate


def _ablated(run: Run, key: SliceRange) -> list[int]:
    table = run.slices[run.slices["labelled"]]
    validation = table["split"] == "validation"
    chosen = table.loc[validation if validation.any() else table["split"] == "test", "slice"]
    return [int(row) for row in chosen if key.start <= row < key.stop]


def class_sets(run: Run, features: int) -> dict[SetName, tuple[int, ...]]:
    """The sets that are masked for each class: predictive are those of the class's pooled ranking.

    None without test queries: then no feature is known to be predictive.
    """
    if "test" not in run.query_sets:
        return {}
    found: dict[SetName, tuple[int, ...]] = {}
    for class_id in range(1, len(run.classes) + 1):
        seed = (run.config.seed % 2**63, *Ablate.name.encode(), class_id)
        sets = feature_sets(sorted(predictive_features(run, class_id)), features, run.config.features.random_sets, seed)
        found |= {(class_id, name): chosen for name, chosen in sets.items()}
    return found


def _summed(dropped: Tensor, features: int, sets: Sequence[SetName]) -> Result:
    """Sums over the slices of a key: NaN is where a slice doesn't have the class."""
    defined = ~dropped.isnan()
    sums = torch.where(defined, dropped, 0).sum(0)
    return {
        "slices": defined[:, 0].sum(0).tolist(),
        "features": sums[:features].tolist(),
        "sets": [float(sums[features + number, class_id - 1]) for number, (class_id, _) in enumerate(sets)],
    }


@dataclass(frozen=True)
class TabulateImpact(Stage[str]):
    """``feature_impact.parquet`` and ``feature_set_impact.parquet``: the means of eq. 9 over slices.

    ``impact`` is NaN for a class that stands on no slice.
    """

    name: ClassVar[str] = "impact-tables"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """One key, where slices are ablated: the tables are written whole."""
        return ["impact"] if Ablate(self.run).keys() else []

    def open(self) -> Callable[[str], Result]:
        """Collect what was summed."""

        def tabulate(_: str) -> Result:
            run = self.run
            results = results_of(Ablate(run))
            slices = np.sum([result["slices"] for result in results], axis=0)
            sums = np.sum([result["features"] for result in results], axis=0)
            run.store.write_table(paths.FEATURE_IMPACT, _feature_rows(sums, slices))
            totals = np.sum([result["sets"] for result in results], axis=0)
            run.write_table(paths.FEATURE_SET_IMPACT, _set_rows(class_sets(run, len(sums)), totals, slices))
            return {}

        return tabulate


def _means(sums: np.ndarray, slices: np.ndarray) -> np.ndarray:
    return np.where(slices > 0, sums / np.maximum(slices, 1), np.nan)


def _feature_rows(sums: np.ndarray, slices: np.ndarray) -> pd.DataFrame:
    features, classes = sums.shape
    return pd.DataFrame(
        {
            "feature": np.repeat(np.arange(features, dtype=np.int16), classes),
            "class": np.tile(np.arange(1, classes + 1, dtype=np.int32), features),
            "impact": _means(sums, slices).ravel(),
            "slices": np.tile(slices, features).astype(np.int32),
        }
    )


def _set_rows(sets: Mapping[SetName, tuple[int, ...]], totals: np.ndarray, slices: np.ndarray) -> pd.DataFrame:
    classes = np.asarray([class_id for class_id, _ in sets], dtype=np.int32)
    counts = slices[classes - 1]
    return pd.DataFrame(
        {
            "set": pd.Series([name for _, name in sets], dtype="string"),
            "class": classes,
            "impact": _means(totals, counts),
            "size": np.asarray([len(chosen) for chosen in sets.values()], dtype=np.int16),
            "slices": counts.astype(np.int32),
        }
    )
