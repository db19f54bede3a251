"""The paper's figures that are drawn from tables: proponent classes, the impact of features.

What a class or a set is called stands beside its colour.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import cycle
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_tracin.featuring import predictive_features
from ray_tracin.runs import Run
from ray_tracin.store import IncompleteRunError

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
"""Of the classes, in order (Okabe and Ito)."""
PREDICTIVE, OTHERS = "#0072B2", "#999999"
PERMUTATIONS = 9999
LEAST_P = 0.001
"""That is written out."""
WIDTH_INCHES = 7.2
"""Of a printed page: text keeps the size that it has here."""


def class_colours(count: int) -> list[str]:
    """A colour for each class; they repeat after the seventh."""
    return [colour for colour, _ in zip(cycle(COLOURS), range(count), strict=False)]


def printed(value: float) -> str:
    """A number as it stands in a picture: two digits, exponents for small ones alone, a minus that is no hyphen."""
    plain = f"{value:.2g}"
    if "e" in plain and abs(value) >= 1:
        plain = f"{float(plain):.0f}"
    return plain.replace("-", "−")


def fixed(value: float, digits: int = 2) -> str:
    """A number with so many decimals, a dash where there is none."""
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def draw_proponent_classes(run: Run) -> Figure:
    """Figure 5: the classes of the top proponents of each query class, global explainers left out."""
    table = run.table("proponent_classes")
    sets = list(dict.fromkeys(table["query_set"]))
    width = min(WIDTH_INCHES, 3.2 * len(sets) + 0.8)
    figure = Figure(figsize=(width, 2.8), layout="constrained", facecolor="white")
    for axis, query_set in zip(figure.subplots(1, len(sets), squeeze=False, sharey=True)[0], sets, strict=True):
        shares = table[table["query_set"] == query_set].pivot(
            index="query_class", columns="train_class", values="share"
        )
        left = np.zeros(len(shares))
        for train_class, colour in zip(shares.columns, class_colours(len(run.classes)), strict=True):
            values = shares[train_class].to_numpy(dtype=float)
            axis.bar(list(run.classes), values, bottom=left, color=colour, label=run.classes[int(train_class) - 1])
            left = left + np.where(np.isnan(values), 0, values)
        axis.set_title(f"{query_set} queries", fontsize=9)
        axis.set_xlabel("class of the query", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_ylim(0, 1)
    settings = run.config.explainers
    figure.axes[0].set_ylabel(
        f"share of the top {settings.class_list} proponents\n(by {settings.score} influence)", fontsize=8
    )
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right upper", title="their class", title_fontsize=8, fontsize=8, frameon=False
    )
    return figure


def findings(run: Run) -> list[str]:
    """The paper's two questions, answered by this run, a line a class.

    Are the top proponents of a region of its own class? Do predictive features have more impact than the others?
    """
    classes = run.table("proponent_classes")
    own = classes[classes["query_class"] == classes["train_class"]]
    lines = []
    for class_id, name in enumerate(run.classes, start=1):
        mine = own[(own["query_class"] == class_id) & own["share"].notna()]
        shares = [f"{share:.0%} of {kind}" for share, kind in zip(mine["share"], mine["query_set"], strict=True)]
        top = f"top {run.config.explainers.class_list} proponents by {run.config.explainers.score} influence"
        known = f"of this class are {' and '.join(shares)} queries' {top}"
        lines.append(f"{name}: {known if shares else 'no query of this class has proponents'}")
    lines += _crowded(run)
    if "test" in run.query_sets:
        groups = [(name, _impacts(run, class_id)) for class_id, name in enumerate(run.classes, start=1)]
        lines += [f"{name}: impact of predictive features less the others': {compared(*pair)}" for name, pair in groups]
    return lines


def _crowded(run: Run) -> list[str]:
    """A line if there are so few train regions that a list holds more than the share that makes global explainers."""
    length, limit = run.config.explainers.list_length, run.config.explainers.max_share
    regions = len(run.table("global_explainers")[["train_slice", "train_class"]].drop_duplicates())
    if not regions or length / regions <= limit:
        return []
    return [
        f"a list of {length} holds {min(1, length / regions):.0%} of the {regions} train regions: chance alone makes "
        f"global explainers (more than {limit:.0%}), which rankings leave out: --keep-global shows them, a new "
        "run may have a smaller explainers.list_length"
    ]


def _impacts(run: Run, class_id: int) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """The impacts of a class's predictive features, and of its others; none where no slice could be masked."""
    try:
        impact = run.table("feature_impact")
    except IncompleteRunError:
        return np.empty(0), np.empty(0)
    values = impact[impact["class"] == class_id].dropna(subset="impact")
    predictive = values["feature"].isin(predictive_features(run, class_id)).to_numpy()
    drops = values["impact"].to_numpy(dtype=float)
    return drops[predictive], drops[~predictive]


def draw_feature_impact(run: Run) -> Figure:
    """Figure 7: the impact (eq. 9) of masking predictive features and the others, a panel a class.

    The title of a panel has the difference of the means and the share of permutations of the two groups with a
    difference at least as large (one-sided).
    """
    width = max(WIDTH_INCHES, 2.4 * len(run.classes))
    figure = Figure(figsize=(width, 2.7), layout="constrained", facecolor="white")
    for class_id, axis in enumerate(figure.subplots(1, len(run.classes), squeeze=False)[0], start=1):
        groups = _impacts(run, class_id)
        _draw_distributions(axis, groups)
        axis.set_title(f"{run.classes[class_id - 1]}\n{compared(*groups).replace('-', '−')}", fontsize=7.5)
        axis.set_xlabel("impact: drop of Dice when masked", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("density of features", fontsize=8)
    legends = [axis.get_legend_handles_labels() for axis in figure.axes]
    handles, names = max(legends, key=lambda legend: len(legend[0]))  # A class that no slice has draws nothing.
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_distributions(axis: Axes, groups: Sequence[Float[np.ndarray, "..."]]) -> None:
    together = np.concatenate(groups)
    if not together.size:
        axis.text(0.5, 0.5, "no masked slice has the class", ha="center", transform=axis.transAxes, fontsize=8)
        return
    edges = np.histogram_bin_edges(together, bins=12)
    for values, colour, name in zip(groups, (PREDICTIVE, OTHERS), ("predictive", "others"), strict=True):
        axis.hist(values, bins=list(edges), density=bool(values.size), alpha=0.45, color=colour, label=name)
        if np.unique(values).size > 2:
            grid = np.linspace(edges[0], edges[-1], 200)
            axis.plot(grid, _scipy_stats().gaussian_kde(values)(grid), color=colour, linewidth=1.2)


def compared(predictive: Float[np.ndarray, "..."], others: Float[np.ndarray, "..."]) -> str:
    """How much larger the mean impact of predictive features is, and how often chance does the same.

    A one-sided permutation test of the difference of means, seeded.
    """
    if not predictive.size or not others.size:
        return f"{predictive.size} predictive, {others.size} others: nothing to compare"
    difference = float(predictive.mean() - others.mean())
    p = _permutation_p(predictive, others)
    return f"{predictive.size} predictive: {difference:+.4f}, {f'p = {p:.3f}' if p >= LEAST_P else f'p < {LEAST_P}'}"


def _permutation_p(predictive: Float[np.ndarray, "..."], others: Float[np.ndarray, "..."]) -> float:
    together = np.concatenate([predictive, others])
    # SciPy wants two values a group. With one there are as many permutations as values: all are counted.
    if predictive.size == 1:
        return float((together >= predictive).mean())
    if others.size == 1:
        return float((together <= others).mean())
    test = _scipy_stats().permutation_test(
        (predictive, others),
        lambda one, other, axis: one.mean(axis=axis) - other.mean(axis=axis),
        alternative="greater",
        n_resamples=PERMUTATIONS,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _scipy_stats() -> Any:
    """The module, which takes longer to import than any other: commands that compare nothing don't wait for it."""
    return import_module("scipy.stats")
