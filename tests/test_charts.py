import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ray_tracin.charts import (
    class_colours,
    compared,
    draw_feature_impact,
    draw_proponent_classes,
    findings,
    printed,
)
from ray_tracin.featuring import POOLED
from ray_tracin.figures import render
from ray_tracin.runs import Run, open_run


def test_the_permutation_test_counts_permutations() -> None:
    # Of the 20 ways to choose 3 of 6, one has all the ones.
    assert compared(np.ones(3), np.zeros(3)) == "3 predictive: +1.0000, p = 0.050"
    assert compared(np.zeros(3), np.ones(3)) == "3 predictive: -1.0000, p = 1.000"


def test_one_feature_in_a_group_is_compared_too() -> None:
    # Of 5 values, 2 are at least as large as the one that is predictive; 1 is as small as the one that isn't.
    assert compared(np.array([3.0]), np.array([1.0, 2.0, 0.0, 4.0])) == "1 predictive: +1.2500, p = 0.400"
    assert compared(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0])) == "4 predictive: +2.5000, p = 0.200"


def test_a_p_below_a_thousandth_is_called_so() -> None:
    few, many = np.linspace(1, 1.1, 3), np.linspace(0, 0.1, 17)
    # Of the 1140 ways to choose 3 of 20, one has the largest.
    assert compared(few, many) == "3 predictive: +1.0000, p < 0.001"
    # Of 1000 values, one is as large: p is 0.001, which is written.
    assert compared(np.array([2.0]), np.linspace(0, 1, 999)) == "1 predictive: +1.5000, p = 0.001"
    assert compared(np.array([2.0]), np.linspace(0, 1, 1999)) == "1 predictive: +1.5000, p < 0.001"


@pytest.mark.parametrize(("predictive", "others"), [(0, 4), (4, 0)])
def test_one_group_is_nothing_to_compare(predictive: int, others: int) -> None:
    text = compared(np.ones(predictive), np.ones(others))
    assert text == f"{predictive} predictive, {others} others: nothing to compare"


def test_colours_repeat_only_after_the_seventh() -> None:
    assert len(set(class_colours(7))) == 7
    assert class_colours(9)[7:] == class_colours(2)


def test_bars_are_the_shares_of_the_table(tiny_run: Run) -> None:
    table = tiny_run.table("proponent_classes")
    figure = draw_proponent_classes(tiny_run)
    for axis, query_set in zip(figure.axes, ("train", "test"), strict=True):
        mine = table[table.query_set == query_set].sort_values(["train_class", "query_class"])
        heights = [bar.get_height() for bar in axis.patches]
        np.testing.assert_allclose(heights, mine.share.to_numpy())


def with_lists_of(run: Run, length: int) -> Run:
    settings = run.config.explainers.model_copy(update={"list_length": length})
    return Run(run.store, run.config.model_copy(update={"explainers": settings}))


def test_findings_answer_both_questions_for_every_class(tiny_run: Run) -> None:
    lines = findings(with_lists_of(tiny_run, 3))
    assert len(lines) == 2 * len(tiny_run.classes)
    table = tiny_run.table("proponent_classes")
    own = table[(table.query_class == 2) & (table.train_class == 2)].set_index("query_set").share
    assert f"{own['train']:.0%} of train and {own['test']:.0%} of test queries' top 10" in lines[1]


def test_findings_say_where_chance_alone_makes_global_explainers(tiny_run: Run) -> None:
    there = tiny_run.table("regions").query("pixels > 0")
    regions = there["slice"].isin(tiny_run.train_slices).sum()
    few = int(0.3 * regions)
    classes = len(tiny_run.classes)
    assert findings(with_lists_of(tiny_run, few)) == findings(with_lists_of(tiny_run, 1))
    crowded = findings(with_lists_of(tiny_run, few + 1))[classes]
    assert crowded.startswith(f"a list of {few + 1} holds ")
    assert f"of the {regions} train regions: chance alone makes global explainers (more than 30%)" in crowded
    assert "a list of 20 holds" in findings(tiny_run)[classes]


def test_numbers_in_pictures() -> None:
    assert [printed(value) for value in (430.0, -0.013, 0.0, -12345.0, 2.6e-06)] == [
        *("430", "−0.013", "0", "−12000", "2.6e−06"),
    ]


@pytest.fixture
def telling(tiny_run: Run, tmp_path: Path) -> Run:
    """Of twenty features ten are predictive, and these matter more than all others; no slice has the first class."""
    root = tmp_path / "run"
    shutil.copytree(tiny_run.uri, root, ignore=shutil.ignore_patterns("gradients.zarr", "tiles.zarr"))
    lines = pd.MultiIndex.from_product([range(20), (1, 2, 3)], names=["feature", "class"]).to_frame(index=False)
    predictive = lines["feature"] < 10
    impact = np.where(predictive, 0.5, 0.0) + lines["feature"] / 1000
    lines.assign(impact=impact.where(lines["class"] != 1)).to_parquet(root / "tables/feature_impact.parquet")
    trends = lines.rename(columns={"class": "query_class"}).assign(
        train_class=POOLED, predictive=predictive, importance_first=1.0
    )
    trends.to_parquet(root / "tables/feature_trends.parquet")
    return open_run(root)


def test_figure_7_and_the_findings_say_how_small_p_is(telling: Run) -> None:
    figure = draw_feature_impact(telling)
    first, *others = (axis.get_title().split("\n")[1] for axis in figure.axes)
    assert first == "0 predictive, 0 others: nothing to compare"
    assert others == ["10 predictive: +0.4900, p < 0.001"] * 2
    assert [line.split(": ", 2)[2] for line in findings(telling)[-2:]] == others


def test_figure_7_has_its_legend_where_the_first_class_has_no_impact(telling: Run) -> None:
    figure = draw_feature_impact(telling)
    assert not figure.axes[0].get_legend_handles_labels()[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["predictive", "others"]


def test_where_no_query_has_ground_truth_no_feature_has_an_impact(telling: Run) -> None:
    (Path(telling.uri) / "tables/feature_impact.parquet").unlink()
    nothing = "0 predictive, 0 others: nothing to compare"
    assert [line.split(": ", 2)[2] for line in findings(telling)[-3:]] == [nothing] * 3
    figure = draw_feature_impact(telling)
    assert [axis.get_title().split("\n")[1] for axis in figure.axes] == [nothing] * 3
    assert {axis.texts[0].get_text() for axis in figure.axes} == {"no masked slice has the class"}
    assert render(figure).startswith(b"\x89PNG")
