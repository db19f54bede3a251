"""Slices as the report shows them: small pictures, label maps as runs, and what a region is annotated as.

The one idea: what is expensive (a forward pass a slice, an encoded picture) is done once and kept in ``pictures/``;
the report can then be rendered again with other options in seconds. The parts are Parquet files, a row a slice:

``image``
    WebP, the modalities side by side; [−1, 1] becomes 0 to 255.
``maps``
    WebP with transparency, the maps of `mapped_features` side by side: strong where the map is.
``prediction``
    Runs (`encode_runs`) of the label map ``2·class + confident``: the argmax of the final network, and whether the
    pixel is in the region.
``truth``
    Runs of the ground truth; empty where there is none.
``predicted``, ``agreed``
    Of each class the pixels of the argmax, and how many of them have the class in the ground truth.
``annotated``
    Of each region its pixels by what the ground truth says of them, background first: C·(C+1) counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float32, Integer, UInt8
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from ray_tracin import store as paths
from ray_tracin.devices import pick_device
from ray_tracin.featuring import MAXIMA, pooled
from ray_tracin.mapping import PREDICTED_SLICES, slice_ranges
from ray_tracin.regions import predicted_labels
from ray_tracin.runs import FINAL, Run
from ray_tracin.stages import Result, Stage
from ray_tracin.store import Array
from ray_tracin.unet import HEAD, last_hidden_maps
from ray_tracin.vocabulary import SliceRange

PARTS = "pictures"
QUALITY = 85
"""Of the WebP pictures of slices; at 192 × 192 and four modalities 24 KiB."""
MAP_QUALITY = 60
MAPPED_FEATURES = 8
"""Feature maps that are kept of each slice."""
MAP_SIZE = 48
"""Side of a kept feature map at the most, pixels: each is the maximum of a block, as the feature is of the region."""
MAP_COLOURS = "plasma"
MAP_OPACITY = 0.85


@dataclass(frozen=True)
class DrawSlices(Stage[SliceRange]):
    """Predict every slice once more and keep what the report shows of it: ``pictures/``."""

    name: ClassVar[str] = "pictures"
    uses_gpu: ClassVar[bool] = True

    def keys(self) -> Sequence[SliceRange]:
        """Ranges of all slices, as their regions were mapped."""
        return slice_ranges(self.run)

    def open(self) -> Callable[[SliceRange], Result]:
        """Run the final network over a range of slices, and encode."""
        run = self.run
        torch.set_num_threads(run.config.resources.threads)
        device = pick_device(run)
        network = run.model(FINAL).to(device)
        features = mapped_features(run)
        scales = _scales(run, features)

        def draw(key: SliceRange) -> Result:
            prediction, maps = _predict(network, torch.from_numpy(run.images(_rows(key))), features, device)
            rows = _slice_rows(run, key, prediction, maps / scales[:, None, None])
            run.store.write_table(part_path(key), pd.DataFrame(rows))
            return {}

        return draw


def part_path(key: SliceRange) -> str:
    """Where the pictures of a range of slices are."""
    return f"{PARTS}/{key}.parquet"


def mapped_features(run: Run) -> list[int]:
    """The features whose maps are kept: predictive ones of any class first, then by importance at the first proponent.

    Without test queries nothing is known of importance: then those with the largest maxima in train regions.
    """
    if "test" not in run.query_sets:
        order = np.argsort(-_largest_maxima(run), kind="stable")
        return [int(feature) for feature in order[:MAPPED_FEATURES]]
    best = pooled(run, "feature_trends").groupby("feature")[["predictive", "importance_first"]].max()
    ordered = best.sort_values(["predictive", "importance_first"], ascending=False, kind="stable")
    return [int(feature) for feature in ordered.index[:MAPPED_FEATURES]]


def _largest_maxima(run: Run) -> Float32[np.ndarray, " feature"]:
    """The largest value of every feature in any train region; 0 where it is silent."""
    maxima = run.store.read(MAXIMA)[list(run.train_slices)]
    largest: Float32[np.ndarray, " feature"] = np.where(np.isnan(maxima), 0, maxima).max(axis=(0, 1)).astype(np.float32)
    return largest


def _scales(run: Run, features: Sequence[int]) -> Float32[np.ndarray, " feature"]:
    """What is drawn strongest of each feature, the same on every slice; 1 for a silent one."""
    largest = _largest_maxima(run)[list(features)]
    return np.where(largest > 0, largest, 1).astype(np.float32)


def _rows(key: SliceRange) -> range:
    return range(key.start, key.stop)


def _predict(
    network: nn.Module, images: Tensor, features: Sequence[int], device: torch.device
) -> tuple[Array, Float32[np.ndarray, "slice feature y x"]]:
    """Predicted labels, and the maps of some features in small."""
    side = min(MAP_SIZE, images.shape[-1])
    labels, small = [], []
    with torch.inference_mode():
        for batch in images.split(PREDICTED_SLICES):
            logits, maps = last_hidden_maps(network, HEAD, batch.to(device))
            labels.append(predicted_labels(logits).cpu())
            small.append(nn.functional.adaptive_max_pool2d(maps[:, list(features)].float(), side).cpu())
    return torch.cat(labels).numpy(), torch.cat(small).numpy()


def _slice_rows(run: Run, key: SliceRange, prediction: Array, maps: Array) -> list[dict[str, Any]]:
    images, labels = run.images(_rows(key)), run.labels(_rows(key))
    masks = run.store.read(paths.MASKS, (slice(key.start, key.stop),))
    labelled = run.slices.set_index("slice")["labelled"].reindex(_rows(key)).to_numpy(dtype=bool)
    return [
        {
            "slice": row,
            "image": encode_image(images[place]),
            "maps": encode_maps(maps[place]),
            "prediction": encode_runs(2 * prediction[place].astype(np.int64) + masks[place].any(0)),
            "truth": encode_runs(labels[place]) if labelled[place] else b"",
            **_counts(prediction[place], labels[place], masks[place]),
        }
        for place, row in enumerate(_rows(key))
    ]


def _counts(
    prediction: Integer[np.ndarray, "h w"], truth: Integer[np.ndarray, "h w"], masks: Bool[np.ndarray, "class h w"]
) -> Mapping[str, list[int]]:
    classes = range(1, len(masks) + 1)
    return {
        "predicted": [int((prediction == c).sum()) for c in classes],
        "agreed": [int(((prediction == c) & (truth == c)).sum()) for c in classes],
        "annotated": [int(count) for mask in masks for count in np.bincount(truth[mask], minlength=len(masks) + 1)],
    }


def encode_image(image: Float[np.ndarray, "modality h w"]) -> bytes:
    """The modalities of a slice side by side, as WebP."""
    strip = np.concatenate(list(image), axis=1)
    grey = np.rint((np.clip(strip, -1, 1) + 1) * 127.5).astype(np.uint8)
    return _webp(Image.fromarray(grey).convert("RGB"), QUALITY)


def encode_maps(maps: Float[np.ndarray, "feature y x"]) -> bytes:
    """Feature maps side by side, as WebP: the larger the value (up to 1) the warmer and the more opaque."""
    strip = np.clip(np.concatenate(list(maps), axis=1), 0, 1)
    painted: UInt8[np.ndarray, "y x 4"] = colormaps[MAP_COLOURS](strip, bytes=True)
    painted[..., 3] = np.rint(255 * MAP_OPACITY * np.sqrt(strip))
    return _webp(Image.fromarray(painted), MAP_QUALITY)


def _webp(image: Image.Image, quality: int) -> bytes:
    sink = BytesIO()
    image.save(sink, format="WEBP", quality=quality, method=4)
    return sink.getvalue()


def encode_runs(labels: Integer[np.ndarray, "h w"]) -> bytes:
    """A label map as runs of equal values, row by row: value and length of each, as LEB128 numbers (7 bits a byte).

    >>> encode_runs(np.array([[0, 0, 5]])).hex()
    '00020501'
    """
    flat = labels.ravel()
    starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
    lengths = np.diff(np.r_[starts, flat.size])
    coded = bytearray()
    for value, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        for number in (value, length):
            rest = number
            while rest > 0x7F:
                coded.append(rest & 0x7F | 0x80)
                rest >>= 7
            coded.append(rest)
    return bytes(coded)
