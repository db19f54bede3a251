import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ray_tracin.curves import Example, _caption, draw_feature_curves, examples, feature_maps
from ray_tracin.runs import Run, open_run


def test_curves_are_the_importance_of_the_table(tiny_run: Run) -> None:
    table = tiny_run.table("feature_importance")
    drawn = [axis for axis in draw_feature_curves(tiny_run).axes if axis.lines]
    assert drawn
    for axis in drawn:
        feature, name = axis.get_title().split("\n")[0].removeprefix("feature ").split(", ")
        class_id = tiny_run.classes.index(name) + 1
        mine = table[(table.feature == int(feature)) & (table.query_class == class_id) & (table.train_class == 0)]
        np.testing.assert_allclose(axis.lines[0].get_ydata(), mine.importance)


def test_a_single_rank_is_drawn_without_a_fit_and_a_legend_of_it(tiny_run: Run, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("gradients.zarr", "tiles.zarr")
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run", ignore=ignored))
    path = Path(run.uri) / "tables/feature_importance.parquet"
    table = pd.read_parquet(path)
    table[table["rank"] == 1].to_parquet(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [axis for axis in draw_feature_curves(run).axes if axis.lines]
    assert [len(axis.lines) for axis in drawn] == [1] * len(drawn)
    assert drawn
    assert drawn[0].get_legend() is None


def test_examples_are_the_ends_and_the_middle_of_the_ranking_of_the_largest_query(tiny_run: Run) -> None:
    regions = tiny_run.table("regions")
    explainers = tiny_run.table("global_explainers")
    pairs = tiny_run.store.read("influence.zarr/test")
    n, seen = len(tiny_run.train_slices), 0
    for class_id in (1, 2, 3):
        mine = regions[(regions["class"] == class_id) & regions.slice.isin(tiny_run.query_slices("test"))]
        found = examples(tiny_run, class_id)
        assert bool(found) == (mine.pixels > 0).any()
        influenced = {
            row
            for row, values in zip(tiny_run.query_slices("test"), pairs[class_id - 1], strict=True)
            if np.nan_to_num(values).any()
        }
        assert (len(found) > 1) == bool(influenced)
        if not influenced:
            continue
        seen += 1
        query, proponent, neutral, opponent = found
        mine = mine[mine.slice.isin(influenced)]
        assert query.slice in mine.slice[mine.pixels == mine.pixels.max()].tolist()
        row = pairs[class_id - 1, tiny_run.query_slices("test").index(query.slice)].copy()
        left_out = explainers[explainers.is_global & (explainers.query_class == class_id)]
        for train_slice, train_class in zip(left_out.train_slice, left_out.train_class, strict=True):
            row[(train_class - 1) * n + tiny_run.train_slices.index(train_slice)] = np.nan
        assert [proponent.influence, opponent.influence] == [np.nanmax(row), np.nanmin(row)]
        overlap = regions.set_index(["class", "slice"]).overlap
        pairs_of = [(column // n + 1, tiny_run.train_slices[column % n]) for column in range(3 * n)]
        low = np.array([overlap[pair] < 0.1 for pair in pairs_of])
        assert abs(neutral.influence) == np.nanmin(np.abs(row[~low]))
        for example in (proponent, neutral, opponent):
            assert row[(example.class_id - 1) * n + tiny_run.train_slices.index(example.slice)] == example.influence
    assert seen >= 2


@pytest.mark.parametrize("nothing", [0.0, np.nan])
def test_a_query_that_nobody_influences_is_no_example_of_proponents_and_opponents(
    tiny_run: Run, tmp_path: Path, nothing: float
) -> None:
    ignored = shutil.ignore_patterns("gradients.zarr", "tiles.zarr")
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run", ignore=ignored))
    tensor, queries = run.store.read("influence.zarr/test"), run.query_slices("test")
    whole, first = tuple(slice(0, length) for length in tensor.shape), examples(run, 2)
    assert len(first) == 4
    shown = []
    while len(found := examples(run, 2)) > 1:
        shown.append(found[0].slice)
        assert any(example.influence != 0 for example in found[1:])
        tensor[1, queries.index(found[0].slice)] = nothing
        run.store.write("influence.zarr/test", whole, tensor)
    pixels = run.table("regions").query("`class` == 2").set_index("slice").pixels
    assert len(shown) > 1
    assert pixels[shown].is_monotonic_decreasing
    assert [example.role for example in found] == [first[0].role]


def test_maps_are_what_the_head_reads_and_their_region_maxima_stand_above(tiny_run: Run) -> None:
    model, held = tiny_run.model("final"), []
    model.head.register_forward_hook(lambda _, inputs, output: held.append(inputs[0]))
    with torch.no_grad():
        model(torch.from_numpy(tiny_run.images([3])))
    np.testing.assert_allclose(next(feature_maps(tiny_run, [3], 2)), held[0][0, 2].numpy(), rtol=1e-5, atol=1e-6)


def test_below_each_curve_is_its_feature_on_query_proponent_neutral_and_opponent(tiny_run: Run) -> None:
    figure = draw_feature_curves(tiny_run)
    curves, maps = ([axis for axis in part.axes if axis.get_title()] for part in figure.subfigs)
    assert len(maps) == 4 * len(curves)
    maxima = tiny_run.store.read("features.zarr/maxima")
    for place, curve in enumerate(curves):
        feature, name = curve.get_title().split("\n")[0].removeprefix("feature ").split(", ")
        class_id, k = tiny_run.classes.index(name) + 1, int(feature)
        found = examples(tiny_run, class_id)
        query = maxima[found[0].slice, class_id - 1, k]
        for row, example in enumerate(found):
            axis = maps[row * len(curves) + place]
            image, overlay = (drawn.get_array() for drawn in axis.images)
            np.testing.assert_array_equal(image, tiny_run.images([example.slice])[0, -1])
            np.testing.assert_array_equal(overlay, next(feature_maps(tiny_run, [example.slice], k)))
            own = maxima[example.slice, example.class_id - 1, k]
            assert f"f = {own:.2f}" in axis.get_title()
            if row and max(query, own) > 0:
                same = query * own / max(abs(query), abs(own)) ** 2
                assert float(axis.get_title().split("S = ")[1]) == pytest.approx(same, abs=0.0051)


def test_a_similarity_that_is_undefined_is_called_so(tiny_run: Run) -> None:
    example = Example("proponent", tiny_run.train_slices[0], 1, 0.25)
    assert _caption(tiny_run, example, 0.0, float("nan")).endswith("T = 0.25, f = 0.00, S undefined")
    assert _caption(tiny_run, example, 0.5, -0.75).endswith("T = 0.25, f = 0.50, S = −0.75")
