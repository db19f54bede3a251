"""Pictures of a run, as one would print them: the explanation of a region among the training slices behind it.

Slices are drawn as radiologists see them: anterior at the top, the patient's left on the right. Colours are those of
Okabe and Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ray_tracin import store as paths
from ray_tracin.explanation import RegionExplanation
from ray_tracin.runs import Run
from ray_tracin.store import Array

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
"""Of the classes, in order."""
REGION_OPACITY = 0.45
TILE_INCHES = 1.75
DPI = 150


def draw_explanation(run: Run, found: RegionExplanation, path: Path, *, shown: int = 4, modality: str = "") -> None:
    """Write a PNG: the explained region in every modality, and below it its strongest proponents and opponents.

    The filled area is the region (where the network is confident of the class), the line the ground truth. Train slices
    are drawn in one modality, the first that ``modality`` names or else the last of the run.

    Raises:
        ValueError: the run has no such modality.
    """
    channel = _channel(run, modality)
    columns = max(len(run.modalities), shown)
    figure = Figure(figsize=(columns * TILE_INCHES, 3 * (TILE_INCHES + 0.42)), layout="constrained", facecolor="white")
    axes = figure.subplots(3, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    _draw_query(run, found, list(axes[0]))
    for row, title, ranking in ((1, "proponent", found.proponents), (2, "opponent", found.opponents)):
        for axis, line in zip(axes[row], ranking.head(shown).to_dict("records"), strict=False):
            _draw_slice(axis, run, line["slice"], line["class_id"], channel)
            heading = f"{title} {line['rank']}: {line['influence']:.2g}"
            where = f"{line['class_name']}, {_short(line['patient'])}, {line['index']}"
            axis.set_title(f"{heading}\n{where}", fontsize=7)
    figure.suptitle(
        f"{found.class_name} of {found.patient}, slice {found.index}: region Dice {found.dice:.2f}, overlap "
        f"{found.overlap:.2f}",
        fontsize=9,
    )
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(path, dpi=DPI, metadata={"Software": "ray_tracin"})


def _channel(run: Run, modality: str) -> int:
    if not modality:
        return len(run.modalities) - 1
    if modality not in run.modalities:
        raise ValueError(f"no modality {modality!r}; modalities of this run: {', '.join(run.modalities)}")
    return run.modalities.index(modality)


def _draw_query(run: Run, found: RegionExplanation, axes: Sequence[Axes]) -> None:
    for channel, name in enumerate(run.modalities):
        _draw_slice(axes[channel], run, found.slice, found.class_id, channel)
        axes[channel].set_title(name, fontsize=8)
    axes[0].text(0.02, 0.5, "R", color="white", fontsize=7, va="center", transform=axes[0].transAxes)
    axes[0].text(0.98, 0.5, "L", color="white", fontsize=7, va="center", ha="right", transform=axes[0].transAxes)


def _draw_slice(axis: Axes, run: Run, row: int, class_id: int, channel: int) -> None:
    image = run.images([row])[0, channel]
    truth = run.labels([row])[0] == class_id
    selection = (slice(row, row + 1), slice(class_id - 1, class_id), *(slice(0, length) for length in image.shape))
    region = run.store.read(paths.MASKS, selection)[0, 0]
    axis.imshow(_painted(image, region, COLOURS[(class_id - 1) % len(COLOURS)]), interpolation="nearest")
    if truth.any():
        line = axis.contour(truth, levels=[0.5], colors="white", linewidths=0.7)
        line.set(path_effects=[withStroke(linewidth=1.6, foreground="black")])  # white alone is lost on bright tumours


def _painted(image: Array, region: Array, colour: str) -> Array:
    """RGB of a slice in [−1, 1] with a region in a colour over it."""
    grey = np.clip((image[..., None] + 1) / 2, 0, 1)
    opacity = REGION_OPACITY * region[..., None]
    painted: Any = grey * (1 - opacity) + np.asarray(to_rgb(colour)) * opacity
    return np.asarray(painted)


def _short(patient: str) -> str:
    return patient if len(patient) <= 14 else f"…{patient[-13:]}"
