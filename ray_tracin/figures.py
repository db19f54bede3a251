"""Pictures of a run, as one would print them: the paper's figures, and the explanation of a region.

Slices are drawn by `panels`, as radiologists see them. Colours are those of Okabe and Ito, which colour-blind readers
can tell apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, SymLogNorm, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text

from ray_tracin import store as paths
from ray_tracin.charts import WIDTH_INCHES, class_colours, draw_feature_impact, draw_proponent_classes, fixed, printed
from ray_tracin.curves import draw_feature_curves
from ray_tracin.explanation import RegionExplanation
from ray_tracin.panels import draw_region, mark_sides, shortened
from ray_tracin.runs import Run
from ray_tracin.scores import train_cells
from ray_tracin.stages import Result, Stage

STRIP_INCHES = 0.14
"""Height of a line of the heat map."""
TILE_INCHES, LABEL_INCHES, NARROWEST_INCHES = 1.25, 1.3, 4.5
"""Of the explanation of a region: sides of a slice, width of what stands beside it, width at the least."""
PRINT_DPI, SCREEN_DPI = 300, 150
MATRIX_PIXELS = 1300
"""Side of the drawn train-influence matrix at the most, and fewer than it has in print; a larger one is averaged."""
ZERO = "#d0d0d0"
"""No influence: white is where there is no region."""
SCALE_QUANTILES = (0.5, 0.995)
"""Of the absolute influence: below the first the colour scale is linear, at the second it ends."""


def draw_explanation(run: Run, found: RegionExplanation, path: Path, *, shown: int = 3) -> None:
    """Write a PNG: the explained region, its strongest proponents, neutral regions and opponents, in every modality.

    The filled area is the region (where the network is confident of the class), the line the ground truth. The heat map
    below has the similarity of each train region with the query in every predictive feature (eq. 7).
    """
    chosen = {name: table.head(shown) for name, table in found.rankings.items()}
    regions = sum(map(len, chosen.values()))
    width = max(LABEL_INCHES + len(run.modalities) * TILE_INCHES, NARROWEST_INCHES)
    strip = STRIP_INCHES * (regions + 4) if found.features and regions else 0
    height = (regions + 1) * TILE_INCHES + 0.7
    figure = Figure(figsize=(width, height + strip), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(height, strip or 0.01))
    upper, lower = parts
    axes = upper.subplots(regions + 1, len(run.modalities), squeeze=False)
    _draw_row(run, list(axes[0]), found.slice, found.class_id, _query_label(found))
    for axis, name in zip(axes[0], run.modalities, strict=True):
        axis.set_title(name, fontsize=8)
    mark_sides(axes[0, 0])
    lines = [(name, line) for name, table in chosen.items() for line in table.to_dict("records")]
    for row, (name, line) in zip(axes[1:], lines, strict=True):
        _draw_row(run, list(row), line["slice"], line["class_id"], _train_label(name, line))
    if strip:
        _draw_links(lower, found, chosen)
    figure.suptitle(
        f"{found.class_name} of {found.patient}, slice {found.index},\nexplained by train regions, ranked by "
        f"{found.ranked_by} influence\nfilled: predicted with confidence; line: ground truth",
        fontsize=8,
    )
    path.write_bytes(render(figure, SCREEN_DPI))


def _draw_row(run: Run, axes: Sequence[Axes], row: int, class_id: int, label: str) -> None:
    """A slice in every modality with a region, and what it is at its left."""
    draw_region(axes, run, row, class_id)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel(label, fontsize=6.5, rotation=0, ha="right", va="center", multialignment="left")


def _query_label(found: RegionExplanation) -> str:
    lines = ["query", f"{found.class_name}, slice {found.index}", shortened(found.patient)]
    lines += [f"region Dice {fixed(found.dice)}", f"overlap {fixed(found.overlap)}"]
    return "\n".join(lines if found.labelled else [*lines, "no ground truth"])


def _train_label(name: str, line: Mapping[Any, Any]) -> str:
    cosine = "undefined" if np.isnan(line["cosine"]) else printed(line["cosine"])
    lines = [f"{name} {line['rank']}{', global' if line['is_global'] else ''}"]
    lines += [f"{line['class_name']}, slice {line['index']}", shortened(line["patient"])]
    lines += [f"influence {printed(line['influence'])}", f"cosine {cosine}", f"overlap {fixed(line['overlap'])}"]
    return "\n".join(lines)


def _draw_links(figure: SubFigure, found: RegionExplanation, chosen: Mapping[str, pd.DataFrame]) -> None:
    """A row a train region, a column a predictive feature: how much they agree with the query."""
    axis = figure.subplots()
    names = [f"{title} {rank}" for title, table in chosen.items() for rank in table["rank"]]
    columns = [f"feature_{feature}" for feature in found.features]
    values = np.concatenate([table[columns].to_numpy(dtype=float) for table in chosen.values()])
    colours = colormaps["cividis"].with_extremes(bad="white")
    drawn = axis.imshow(values, cmap=colours, vmin=min(0, np.nanmin(values, initial=0)), vmax=1, aspect="auto")
    axis.set_yticks(range(len(names)), names, fontsize=5.5)
    axis.set_xticks(range(len(columns)), [str(feature) for feature in found.features], fontsize=5.5)
    for border in np.cumsum([len(table) for table in chosen.values()])[:-1]:
        axis.axhline(border - 0.5, color="white", linewidth=2)
    axis.set_xlabel("predictive feature, most important first", fontsize=7)
    axis.tick_params(length=0)
    bar = figure.colorbar(drawn, ax=axis, fraction=0.03, pad=0.01)
    bar.set_label("similarity\nwith the query", fontsize=6)
    bar.ax.tick_params(labelsize=5.5)


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
            self.run.store.write_bytes(f"figures/{key}.png", render(FIGURES[key](self.run)))
            return {}

        return draw


def draw_modalities(run: Run) -> Figure:
    """Figure 1: a train slice with every class, in every modality, and its labels."""
    table = run.slices[run.slices["split"] == "train"]
    # The smallest class is the largest there: a slice on which all of them can be seen.
    scarcest = table[[f"pixels_{class_id}" for class_id in range(1, len(run.classes) + 1)]].to_numpy().min(axis=1)
    row = int(table["slice"].to_numpy()[scarcest.argmax()])
    panels = len(run.modalities) + 1
    tile = WIDTH_INCHES / panels
    figure = Figure(figsize=(WIDTH_INCHES, tile + 0.55), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, panels))
    images, labels = run.images([row])[0], run.labels([row])[0]
    for axis, image, name in zip(axes, [*images, images[-1]], [*run.modalities, "labels"], strict=True):
        axis.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    mark_sides(axes[0])
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
    matrix, (linear, end) = train_cells(run, MATRIX_PIXELS).mean, _scale(run)
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
    axis.set_xlabel(f"train region (class, slice; {len(run.train_slices)} slices)\nwhite: no such region")
    axis.set_ylabel("query region (class, slice)")
    figure.colorbar(drawn, ax=axis, label="raw influence (eq. 6)", shrink=0.85, extend="both")
    return figure


def _scale(run: Run) -> tuple[float, float]:
    step = max(1, len(run.train_slices) // 200)
    sizes = np.abs(run.store.read(f"{paths.INFLUENCE}/train", (slice(None), slice(None, None, step), slice(None))))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if not sizes.size:
        return 1.0, 10.0
    linear, end = (float(value) for value in np.quantile(sizes, SCALE_QUANTILES))
    return linear, max(end, 10 * linear)


def _diverging() -> Colormap:
    """Purple and orange, which colour-blind readers can tell apart, with grey between them."""
    ends = colormaps["PuOr_r"]
    stops = [to_rgb(ends(0.0)), to_rgb(ends(0.2)), to_rgb(ZERO), to_rgb(ends(0.8)), to_rgb(ends(1.0))]
    return LinearSegmentedColormap.from_list("influence", stops).with_extremes(bad="white")


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


def render(figure: Figure, dpi: int = PRINT_DPI) -> bytes:
    """A figure as a PNG file."""
    for text in figure.findobj(Text):
        # Names of patients and classes may hold dollars; formulas stand on scales alone.
        text.set_parse_math("$" not in text.get_text() or "\\mathdefault" in text.get_text())
    sink = BytesIO()
    figure.savefig(sink, format="png", dpi=dpi, metadata={"Software": "ray_tracin"})
    return sink.getvalue()
