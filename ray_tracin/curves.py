"""Figure 6: how important features are along the rankings, and what they look like on a query and its train regions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ray_tracin.assembly import train_regions
from ray_tracin.charts import OTHERS, PREDICTIVE, WIDTH_INCHES, printed
from ray_tracin.devices import device_here
from ray_tracin.explainers import NONE, rank_regions, without_zeros
from ray_tracin.explaining import global_columns
from ray_tracin.explanation import neutrality, query_scores, region_features
from ray_tracin.features import similarity
from ray_tracin.featuring import pooled
from ray_tracin.panels import draw_feature, mark_sides, region_mask, shortened
from ray_tracin.runs import FINAL, Run
from ray_tracin.store import Array
from ray_tracin.unet import HEAD, last_hidden_maps

SHOWN_TRENDS = ("u_shaped", "linear", "flat", "inverted_u")
CURVES_INCHES, PANEL_INCHES = 2.2, 1.75
"""Heights of the curves and of a row of slices."""
ROLES = ("query", "proponent", "neutral", "opponent")
"""The rows of slices."""
Line = Mapping[Any, Any]
"""A row of ``feature_trends.parquet``."""


@dataclass(frozen=True)
class Example:
    """A region on which a feature is shown: the query, or a train region by what it is to it."""

    role: str
    slice: int
    class_id: int
    influence: float
    """On the query; NaN of the query itself."""


def draw_feature_curves(run: Run) -> Figure:
    """Figure 6: importance against rank (eq. 8, pooled over train classes) of four features, and their maps.

    For each of the trends ``u_shaped``, ``linear``, ``flat`` and ``inverted_u`` the feature whose first importance is
    largest; where a run lacks one, the next most important features fill up. Below each curve the feature's map over
    the largest test region of the class (`examples`) and over its first proponent, the train region with the influence
    nearest to 0, and its first opponent; with its maximum ``f`` in each region and the similarity ``S`` with the query
    (eq. 7).
    """
    trends = pooled(run, "feature_trends")
    chosen = _chosen_features(trends[trends["trend"] != "dead"])
    lines = chosen.to_dict("records")
    shown = {class_id: examples(run, class_id) for class_id in sorted({int(line["query_class"]) for line in lines})}
    rows = len(ROLES) if any(shown.values()) else 0
    figure = Figure(
        figsize=(WIDTH_INCHES, CURVES_INCHES + rows * PANEL_INCHES), layout="constrained", facecolor="white"
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=(CURVES_INCHES, max(rows * PANEL_INCHES, 0.01)))
    upper, lower = parts
    _draw_curves(upper, run, lines)
    if rows:
        _draw_maps(lower, run, lines, shown)
    return figure


def _chosen_features(trends: pd.DataFrame) -> pd.DataFrame:
    ordered = trends.sort_values("importance_first", ascending=False, kind="stable")
    firsts = [ordered[ordered["trend"] == trend].head(1) for trend in SHOWN_TRENDS]
    best = pd.concat([*firsts, ordered]).drop_duplicates(["feature", "query_class"])
    return best.head(len(SHOWN_TRENDS))


def examples(run: Run, class_id: int) -> list[Example]:
    """The largest test region of a class, its first proponent, its most neutral train region, its first opponent.

    By raw influence, as the features are ranked, global explainers left out. A region that nobody else has an influence
    on (it has no gradient, or not every checkpoint predicts it) is only shown where there is no other, and alone.
    """
    queries = run.query_slices("test")
    regions = run.table("regions")
    mine = regions[(regions["class"] == class_id) & regions["slice"].isin(queries) & (regions["pixels"] > 0)]
    if mine.empty:
        return []
    largest = mine.sort_values("pixels", ascending=False, kind="stable")["slice"]
    row, left = _influenced(run, class_id, [int(row) for row in largest])
    keys = (left, neutrality(run, left), -left)
    train_slices, train_classes = train_regions(run)
    found = [Example(ROLES[0], row, class_id, float("nan"))]
    for role, key in zip(ROLES[1:], keys, strict=True):
        column = int(rank_regions(key, 1)[0, 0])
        if column != NONE:
            about = int(train_slices[column]), int(train_classes[column])
            found.append(Example(role, *about, float(left[0, column])))
    return found


def _influenced(run: Run, class_id: int, rows: Sequence[int]) -> tuple[int, Float[Tensor, "query column"]]:
    """The first of some test slices whose region is influenced, else the first; and by whom that isn't left out."""
    queries, is_global = run.query_slices("test"), torch.from_numpy(global_columns(run))[class_id - 1]
    for row in rows:
        influence = query_scores(run, "test", queries.index(row), class_id).influence
        left = without_zeros(influence).masked_fill(is_global, torch.nan)
        if not left.isnan().all():
            return row, left
    return rows[0], left


def _draw_curves(figure: SubFigure, run: Run, lines: Sequence[Line]) -> None:
    curves = pooled(run, "feature_importance")
    axes = list(figure.subplots(1, len(SHOWN_TRENDS), sharey=True))
    for axis, line in zip(axes, lines, strict=False):
        mine = curves[(curves["feature"] == line["feature"]) & (curves["query_class"] == line["query_class"])]
        _draw_curve(axis, mine["rank"].to_numpy(dtype=float), mine["importance"].to_numpy(dtype=float))
        mark = ", predictive" if line["predictive"] else ""
        trend = str(line["trend"]).replace("_", "-")
        axis.set_title(f"feature {line['feature']}, {_class_name(run, line)}\n{trend}{mark}", fontsize=7.5)
        axis.set_xlabel("rank by raw influence\n(proponents first)", fontsize=7)
    axes[0].set_ylabel("importance", fontsize=8)
    if axes[0].get_legend_handles_labels()[0]:  # Through a single rank nothing is fitted.
        axes[0].legend(title="least squares", title_fontsize=6, fontsize=6, frameon=False)
    for axis in axes[len(lines) :]:
        axis.set_axis_off()


def _class_name(run: Run, line: Line) -> str:
    return run.classes[int(line["query_class"]) - 1]


def _draw_curve(axis: Axes, rank: Float[np.ndarray, " rank"], importance: Float[np.ndarray, " rank"]) -> None:
    axis.plot(rank, importance, ".", color=OTHERS, markersize=2.5, markeredgewidth=0)
    for degree, style, name in ((1, "--", "line"), (2, "-", "parabola")):
        if len(rank) > degree:
            fitted = np.polynomial.Polynomial.fit(rank, importance, degree)
            axis.plot(rank, fitted(rank), style, color=PREDICTIVE, linewidth=1.2, label=name)
    axis.tick_params(labelsize=7)


def _draw_maps(figure: SubFigure, run: Run, lines: Sequence[Line], shown: Mapping[int, Sequence[Example]]) -> None:
    """A column a feature, a row a role; colours of a column have one scale."""
    axes = figure.subplots(len(ROLES), len(SHOWN_TRENDS), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for axis, role in zip(axes[:, 0], ROLES, strict=True):
        axis.set_ylabel(role, fontsize=8)
    for column, line in zip(axes.T, lines, strict=False):
        if shown[int(line["query_class"])]:
            _draw_column(figure, run, list(column), int(line["feature"]), shown[int(line["query_class"])])
    for axis in axes[:, 0]:
        if axis.images:
            mark_sides(axis)


def _draw_column(figure: SubFigure, run: Run, column: Sequence[Axes], feature: int, found: Sequence[Example]) -> None:
    maps = list(feature_maps(run, [example.slice for example in found], feature))
    top = max(float(values.max()) for values in maps)
    strengths = [region_features(run, example.slice, example.class_id, [feature]) for example in found]
    for example, values, strength in zip(found, maps, strengths, strict=True):
        axis = column[ROLES.index(example.role)]
        image = run.images([example.slice])[0, -1]
        drawn = draw_feature(axis, image, region_mask(run, example.slice, example.class_id), values, top)
        same = float(similarity(strengths[0], strength))
        axis.set_title(_caption(run, example, float(strength), same), fontsize=5.5)
    bar = figure.colorbar(drawn, ax=column[-1], location="bottom", fraction=0.06, pad=0.02)
    bar.set_label(f"map of feature {feature}", fontsize=6)
    bar.ax.tick_params(labelsize=5.5)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))


def _caption(run: Run, example: Example, strength: float, same: float) -> str:
    about = run.slices.set_index("slice").loc[example.slice]
    where = f"{run.classes[example.class_id - 1]}, {shortened(str(about['patient']))}, {about['index']}"
    if example.role == ROLES[0]:
        return f"{where}\nf = {strength:.2f}"
    # Of two regions in which the feature is 0 (eq. 7).
    agreement = "S undefined" if isnan(same) else f"S = {same:.2f}".replace("-", "−")
    return f"{where}\nT = {printed(example.influence)}, f = {strength:.2f}, {agreement}"


def feature_maps(run: Run, rows: Sequence[int], feature: int) -> Iterator[Array]:
    """The map of a feature of the final network's last hidden layer on each of some slices."""
    device = device_here(run)
    network = run.model(FINAL).to(device)
    for row in rows:
        with torch.inference_mode():
            _, maps = last_hidden_maps(network, HEAD, torch.from_numpy(run.images([row])).to(device))
        yield maps[0, feature].float().cpu().numpy()
