"""Pictures of a run, as one would print them: the paper's figures, and the explanation of a region.

Slices are drawn as radiologists see them: anterior at the top, the patient's left on the right. Colours are those of
Okabe and Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, SymLogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ray_tracin import store as paths
from ray_tracin.charts import class_colours, draw_feature_curves, draw_feature_impact, draw_proponent_classes
from ray_tracin.explanation import RegionExplanation
from ray_tracin.runs import Run
from ray_tracin.stages import Result, Stage
from ray_tracin.store import Array
from ray_tracin.vocabulary import ranges

REGION_OPACITY = 0.45
TILE_INCHES = 1.75
DPI = 150
MATRIX_PIXELS = 1800
"""Side of the drawn train-influence matrix at the most; a larger one is averaged in blocks."""
SCALE_QUANTILES = (0.5, 0.995)
"""Of the absolute influence: below the first the colour scale is linear, at the second it ends."""


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
    path.write_bytes(_png(figure))


@dataclass(frozen=True)
class DrawFigures(Stage[str]):
    """The paper's figures from this run, as PNG in ``figures/``."""

    name: ClassVar[str] = "figures"
    light: ClassVar[bool] = True

    def keys(self) -> Sequence[str]:
        """The figures by their numbers in the paper."""
        return [name for name in FIGURES if _NEEDS.get(name, set()) <= set(self.run.query_sets)]

    def open(self) -> Callable[[str], Result]:
        """Draw one and write it."""

        def draw(key: str) -> Result:
            self.run.store.write_bytes(f"figures/{key}.png", _png(FIGURES[key](self.run)))
            return {}

        return draw


def draw_modalities(run: Run) -> Figure:
    """Figure 1: a train slice with every class, in every modality, and its labels."""
    table = run.slices[run.slices["split"] == "train"]
    # The smallest class is the largest there: a slice on which all of them can be seen.
    scarcest = table[[f"pixels_{class_id}" for class_id in range(1, len(run.classes) + 1)]].to_numpy().min(axis=1)
    row = int(table["slice"].to_numpy()[scarcest.argmax()])
    panels = len(run.modalities) + 1
    figure = Figure(figsize=(panels * TILE_INCHES, TILE_INCHES + 0.75), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, panels))
    images, labels = run.images([row])[0], run.labels([row])[0]
    for axis, image, name in zip(axes, [*images, images[-1]], [*run.modalities, "labels"], strict=True):
        axis.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    for class_id, name in enumerate(run.classes, start=1):
        colour = class_colours(class_id)[-1]
        overlay = np.zeros((*labels.shape, 4))
        overlay[labels == class_id] = (*to_rgb(colour), 0.75)
        axes[-1].imshow(overlay, interpolation="nearest")
        axes[-1].plot([], [], "s", color=colour, label=name)
    figure.legend(loc="outside lower center", ncols=len(run.classes), fontsize=7, frameon=False)
    return figure


def draw_influence_matrix(run: Run) -> Figure:
    """Figure 4: the train-influence tensor as a matrix of class blocks, white where there is no region.

    Colours are linear around 0 and logarithmic beyond the median, because influence has heavy tails. Values of a
    matrix that is larger than the picture are averaged in blocks, absent regions left out.
    """
    matrix, (linear, end) = reduced_matrix(run, MATRIX_PIXELS), _scale(run)
    classes, side = len(run.classes), matrix.shape[0]
    figure = Figure(figsize=(6.4, 5.6), layout="constrained", facecolor="white")
    axis = figure.subplots()
    drawn = axis.imshow(
        matrix, cmap=_diverging(), norm=SymLogNorm(linear, vmin=-end, vmax=end), interpolation="nearest"
    )
    middles = [(position + 0.5) * side / classes - 0.5 for position in range(classes)]
    axis.set_xticks(middles, run.classes)
    axis.set_yticks(middles, run.classes, rotation=90, va="center")
    axis.tick_params(length=0)
    for border in range(1, classes):
        axis.axhline(border * side / classes - 0.5, color="black", linewidth=0.6)
        axis.axvline(border * side / classes - 0.5, color="black", linewidth=0.6)
    axis.set_xlabel(f"train region (class, slice; {len(run.train_slices)} slices)")
    axis.set_ylabel("query region (class, slice)")
    figure.colorbar(drawn, ax=axis, label="influence", shrink=0.85)
    return figure


def reduced_matrix(run: Run, pixels: int) -> Float[np.ndarray, "row column"]:
    """The train-influence matrix averaged over blocks to at most so many rows; NaN where no pair of regions is.

    Read a range of queries at a time. Blocks don't cross class borders.
    """
    classes, n = len(run.classes), len(run.train_slices)
    block = max(1, -(-classes * n // pixels))
    rows = []
    for class_id in range(classes):
        for start, stop in ranges(n, block):
            part = run.influence("train")[class_id, start:stop, :]
            columns = np.asarray(part, dtype=np.float64).reshape(stop - start, classes, n)
            edges = [first for first, _ in ranges(n, block)]
            there = np.add.reduceat((~np.isnan(columns)).sum(axis=0), edges, axis=1)
            total = np.add.reduceat(np.nansum(columns, axis=0), edges, axis=1)
            # 0 / 0 is NaN, which is what a block without a region is.
            with np.errstate(invalid="ignore"):
                rows.append((total / there).ravel())
    return np.stack(rows)


def _scale(run: Run) -> tuple[float, float]:
    sizes = np.abs(np.asarray(run.influence("train")[:, :: max(1, len(run.train_slices) // 200), :]))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if not sizes.size:
        return 1.0, 10.0
    linear, end = (float(value) for value in np.quantile(sizes, SCALE_QUANTILES))
    return linear, max(end, 10 * linear)


def _diverging() -> Colormap:
    return colormaps["PuOr_r"].with_extremes(bad="white")


FIGURES: dict[str, Callable[[Run], Figure]] = {
    "figure_1": draw_modalities,
    "figure_4": draw_influence_matrix,
    "figure_5": draw_proponent_classes,
    "figure_6": draw_feature_curves,
    "figure_7": draw_feature_impact,
}
"""By their numbers in the paper."""
_NEEDS: dict[str, set[str]] = {"figure_4": {"train"}, "figure_6": {"test"}, "figure_7": {"test"}}
"""The query sets without which a figure has nothing to show."""


def _png(figure: Figure) -> bytes:
    sink = BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": "ray_tracin"})
    return sink.getvalue()


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
    axis.imshow(_painted(image, region, class_colours(class_id)[-1]), interpolation="nearest")
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
