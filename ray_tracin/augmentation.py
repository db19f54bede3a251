"""Augmentation of slices and their labels for training, by MONAI's transforms.

Everything random is drawn from the seed that comes with a slice. It doesn't know epochs, batches or losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms.compose import Compose, OneOf
from monai.transforms.croppad.dictionary import RandSpatialCropd
from monai.transforms.intensity.dictionary import ShiftIntensityd
from monai.transforms.spatial.dictionary import Rand2DElasticd, RandFlipd, Resized
from monai.transforms.utility.dictionary import Identityd
from torch import Tensor

from ray_tracin.config import AugmentationConfig

IMAGE, LABEL = "image", "label"
KEYS = (IMAGE, LABEL)
BACKGROUND = -1.0
"""Intensity of the background in normalised images."""


def build_augmentation(config: AugmentationConfig, height: int, width: int) -> Compose:
    """A transform of ``{"image", "label"}``, channel first: elastic deformation, random crop, mirroring (section 3.2).

    Each acts with its own probability and on both alike; images are interpolated linearly, labels take the nearest
    value. What comes in from outside the slice is background. A crop is resized back to height × width.
    """
    spacing, magnitude = config.elastic_spacing, config.elastic_magnitude
    window = tuple(max(1, round(config.crop_fraction * side)) for side in (height, width))
    # The elastic transform fills with 0, which is grey in an image: background is 0 while it works. Its cubic
    # interpolation between control points bends the slice by up to 5 % of their spacing even at magnitude 0.
    elastic = [
        ShiftIntensityd(IMAGE, offset=-BACKGROUND),
        Rand2DElasticd(KEYS, spacing, magnitude, prob=1.0, mode=("bilinear", "nearest"), padding_mode="zeros"),
        ShiftIntensityd(IMAGE, offset=BACKGROUND),
    ]
    crop = [
        RandSpatialCropd(KEYS, roi_size=window, random_size=False),
        Resized(KEYS, (height, width), mode=("bilinear", "nearest-exact")),
    ]
    mirror = [RandFlipd(KEYS, prob=1.0, spatial_axis=1)]
    steps = ((config.elastic, elastic), (config.crop, crop), (config.mirror, mirror))
    return Compose([_sometimes(probability, transforms) for probability, transforms in steps])


def _sometimes(probability: float, transforms: Sequence[Any]) -> OneOf:
    # Some transforms have no probability, and the elastic one resamples even when it doesn't deform.
    return OneOf([Compose(transforms), Identityd(KEYS)], weights=[probability, 1 - probability])


def augment(
    augmentation: Compose,
    image: Float32[np.ndarray, "modality h w"],
    labels: UInt8[np.ndarray, "h w"],
    seed: int,
) -> tuple[Float32[Tensor, "modality h w"], UInt8[Tensor, "h w"]]:
    """An augmented slice and its labels; the same seed (32 bits) gives the same augmentation."""
    augmentation.set_random_state(seed=seed)
    pair = {IMAGE: torch.tensor(image), LABEL: torch.tensor(labels)[None].float()}
    with _without_history():
        result = augmentation(pair)
    return result[IMAGE].contiguous(), result[LABEL][0].to(torch.uint8)


@contextmanager
def _without_history() -> Iterator[None]:
    """Inside, MONAI doesn't note what its transforms do to an image, which takes a quarter of their time."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)
