"""The stages in which the trained network predicts: the masks of all regions, and their table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ray_tracin import store as paths
from ray_tracin.devices import pick_device
from ray_tracin.regions import predicted_labels, region_masks, region_overlap, region_pixels, region_scores
from ray_tracin.runs import FINAL, Run
from ray_tracin.stages import Result, Stage
from ray_tracin.vocabulary import SliceRange, checkpoint_name, ranges

PREDICTED_SLICES = 8
"""Slices that are predicted at once. Fixed: another batch could move a pixel across the threshold in its last bit."""
REGION_SLICES = 32
"""Slices of one chunk of ``regions.zarr``."""


def slice_ranges(run: Run) -> list[SliceRange]:
    """All slices, in the ranges in which networks predict them: whole chunks of what is kept of each."""
    return [SliceRange(start, stop) for start, stop in ranges(len(run.slices), REGION_SLICES)]


@dataclass(frozen=True)
class MapRegions(Stage[SliceRange]):
    """Predict every slice and keep its regions: ``regions.zarr``.

    ``mask`` holds the final network's regions; where they come from each checkpoint, ``mask_epoch_NN`` holds those
    that are differentiated. ``labels`` are the labels that scores refer to: the ground truth, or where there is none
    the final network's own prediction.
    """

    name: ClassVar[str] = "regions"
    uses_gpu: ClassVar[bool] = True

    def keys(self) -> Sequence[SliceRange]:
        """Ranges of all slices."""
        return slice_ranges(self.run)

    def write_layout(self) -> None:
        """Create the arrays."""
        run, size = self.run, self.run.config.data.size
        slices, classes = len(run.slices), len(run.classes)
        about = {"threshold": run.config.regions.threshold, "source": run.config.regions.source}
        run.store.create_group("regions.zarr", about)
        for network in region_networks(run):
            run.store.create_array(
                mask_path(network),
                shape=(slices, classes, size, size),
                chunks=(REGION_SLICES, classes, size, size),
                dtype="bool",
                dimensions=("slice", "class", "h", "w"),
                attributes={**about, "source": _source_of(network), "network": network},
            )
        run.store.create_array(
            paths.REGION_LABELS,
            shape=(slices, size, size),
            chunks=(REGION_SLICES, size, size),
            dtype="uint8",
            dimensions=("slice", "h", "w"),
        )

    def open(self) -> Callable[[SliceRange], Result]:
        """The masks of a range of slices, and what the table needs of each region."""
        torch.set_num_threads(self.run.config.resources.threads)
        device = pick_device(self.run)
        networks = {name: self.run.model(name).to(device) for name in region_networks(self.run)}

        def mark(key: SliceRange) -> Result:
            return _map_regions(self.run, key, networks, device)

        return mark


def region_networks(run: Run) -> list[str]:
    """Whose regions are kept: ``final`` always, and each influence checkpoint if they come from there."""
    own = run.config.regions.source == "checkpoint"
    return [FINAL, *(checkpoint_name(epoch) for epoch in run.config.influence_epochs() if own)]


def mask_path(network: str) -> str:
    """Where the masks of a network are."""
    return paths.MASKS if network == FINAL else f"{paths.MASKS}_{network}"


def _map_regions(run: Run, key: SliceRange, networks: Mapping[str, nn.Module], device: torch.device) -> dict[str, Any]:
    rows, where = range(key.start, key.stop), (slice(key.start, key.stop),)
    images = torch.from_numpy(run.images(rows))
    labelled = run.slices["labelled"].to_numpy(dtype=bool)[key.start : key.stop]
    labels = torch.from_numpy(run.labels(rows))
    result: dict[str, Any] = {"slices": list(rows), "labelled": [bool(value) for value in labelled]}
    for name, network in networks.items():
        logits = _predict(network, images, device)
        masks = region_masks(logits, run.config.regions.threshold)
        if name == FINAL:
            labels[~labelled] = predicted_labels(logits)[~labelled]
            result["overlap"] = region_overlap(masks, labels).tolist()
            result["dice"] = region_scores(logits, labels, masks).tolist()
        result[f"pixels_{name}"] = region_pixels(masks).tolist()
        run.store.write(mask_path(name), where, masks.numpy())
    run.store.write(paths.REGION_LABELS, where, labels.numpy())
    return result


def _predict(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode():
        parts = [network(batch.to(device)).float().cpu() for batch in images.split(PREDICTED_SLICES)]
    return torch.cat(parts)


def _source_of(network: str) -> str:
    """The ``regions.source`` under which a network's masks are the ones in use."""
    return FINAL if network == FINAL else "checkpoint"


@dataclass(frozen=True)
class TabulateRegions(Stage[str]):
    """Write ``regions.parquet``, one row a slice and class."""

    name: ClassVar[str] = "region-table"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """One key: the table is written whole."""
        return ["regions"]

    def open(self) -> Callable[[str], Result]:
        """Collect what was counted when the regions were mapped."""

        def tabulate(_: str) -> Result:
            results = [receipt.result for receipt in self.run.store.receipts(MapRegions.name).values()]
            frames = [_region_rows(result, region_networks(self.run)) for result in results]
            table = pd.concat(frames).sort_values(["slice", "class"], ignore_index=True)
            self.run.write_table(paths.REGIONS, table)
            return {"regions": int((table["pixels"] > 0).sum())}

        return tabulate


def _region_rows(result: Result, networks: Sequence[str]) -> pd.DataFrame:
    pixels = np.asarray(result[f"pixels_{FINAL}"])
    slices, classes = pixels.shape
    columns = {
        "slice": np.repeat(np.asarray(result["slices"]), classes),
        "class": np.tile(np.arange(1, classes + 1), slices),
        "pixels": pixels.ravel(),
        "overlap": np.asarray(result["overlap"], dtype=float).ravel(),
        "dice": np.asarray(result["dice"], dtype=float).ravel(),
        "labelled": np.repeat(np.asarray(result["labelled"]), classes),
    }
    own = {f"pixels_{name}": np.asarray(result[f"pixels_{name}"]).ravel() for name in networks if name != FINAL}
    return pd.DataFrame({**columns, **own})
