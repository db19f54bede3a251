"""What is drawn on a slice: the image, a region, the ground truth, a feature map.

Slices are drawn as radiologists see them: anterior at the top, the patient's left on the right. The filled area is the
region (where the network is confident of the class), the white line the ground truth.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke

from ray_tracin import store as paths
from ray_tracin.charts import class_colours
from ray_tracin.runs import Run
from ray_tracin.store import Array

REGION_OPACITY = 0.45
FEATURE_OPACITY = 0.9
DIMMED = 2.5
"""Intensity that is white below a feature map: bright tissue would outshine it."""
FEATURE_COLOURS = "inferno"
LONGEST_NAME = 14


def draw_region(axes: Sequence[Axes], run: Run, row: int, class_id: int) -> None:
    """A slice, an axis a modality, with the region of a class filled and its ground truth outlined."""
    region, truth = region_mask(run, row, class_id), run.labels([row])[0] == class_id
    for axis, image in zip(axes, run.images([row])[0], strict=True):
        axis.imshow(_painted(image, region, class_colours(class_id)[-1]), interpolation="nearest")
        _outline(axis, truth, "white")


def draw_feature(
    axis: Axes,
    image: Float[np.ndarray, "h w"],
    region: Bool[np.ndarray, "h w"],
    feature_map: Float[np.ndarray, "h w"],
    top: float,
) -> AxesImage:
    """A feature map over a slice, transparent where it is 0 and opaque at ``top``; the region is outlined."""
    axis.imshow(image, cmap="gray", vmin=-1, vmax=DIMMED, interpolation="nearest")
    # By the root: a map that is strong somewhere else is not lost where it is weak.
    strength = np.sqrt(np.clip(feature_map / top, 0, 1)) if top > 0 else np.zeros_like(feature_map)
    drawn = axis.imshow(
        feature_map, cmap=FEATURE_COLOURS, vmin=0, vmax=top or 1, alpha=FEATURE_OPACITY * strength, interpolation="none"
    )
    _outline(axis, region, "#56B4E9")
    return drawn


def region_mask(run: Run, row: int, class_id: int) -> Bool[np.ndarray, "h w"]:
    """The pixels of a region."""
    mask: Array = run.store.read(paths.MASKS, (slice(row, row + 1), slice(class_id - 1, class_id)))[0, 0]
    return mask


def mark_sides(axis: Axes) -> None:
    """Write which side of the patient is which."""
    for place, side in ((0.02, "R"), (0.98, "L")):
        align: Any = "left" if side == "R" else "right"
        axis.text(place, 0.5, side, color="white", fontsize=7, va="center", ha=align, transform=axis.transAxes)


def shortened(patient: str) -> str:
    """The end of a name that is too long for a heading."""
    return patient if len(patient) <= LONGEST_NAME else f"…{patient[1 - LONGEST_NAME :]}"


def _outline(axis: Axes, area: Bool[np.ndarray, "h w"], colour: str) -> None:
    if area.any():
        line = axis.contour(area, levels=[0.5], colors=colour, linewidths=0.7)
        # A line alone is lost on bright tumours.
        line.set(path_effects=[withStroke(linewidth=1.6, foreground="black")])


def _painted(image: Array, region: Array, colour: str) -> Array:
    """RGB of a slice in [−1, 1] with a region in a colour over it."""
    grey = np.clip((image[..., None] + 1) / 2, 0, 1)
    opacity = REGION_OPACITY * region[..., None]
    painted: Any = grey * (1 - opacity) + np.asarray(to_rgb(colour)) * opacity
    return np.asarray(painted)
