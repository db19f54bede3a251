"""What is said of one region against numpy on the run's own arrays."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from typer.testing import CliRunner

from ray_tracin import explanation, figures
from ray_tracin.answers import region_lines
from ray_tracin.cli import app
from ray_tracin.config import ExplainersConfig
from ray_tracin.explanation import RegionExplanation, explain_region
from ray_tracin.runs import Run, open_run
from ray_tracin.store import IMAGES, LABELS, MASKS, RunStore
from ray_tracin.vocabulary import UsageError

FEATURES = (2, 0)


@pytest.fixture
def planted(tiny_run: Run, tmp_path: Path) -> Run:
    """A run in which two features are predictive for every class, and a few train regions are global explainers."""
    root = tmp_path / "run"
    shutil.copytree(tiny_run.uri, root, ignore=shutil.ignore_patterns("gradients.zarr", "tiles.zarr"))
    trends = pd.read_parquet(root / "tables/feature_trends.parquet")
    trends["predictive"] = trends.feature.isin(FEATURES) & (trends.train_class == 0)
    trends["importance_first"] = trends.feature / 10
    trends.to_parquet(root / "tables/feature_trends.parquet")
    explainers = pd.read_parquet(root / "tables/global_explainers.parquet")
    explainers["is_global"] = explainers.train_slice % 3 == 0
    explainers.to_parquet(root / "tables/global_explainers.parquet")
    return open_run(root)


def first_region(run: Run, query_set: str) -> tuple[str, int, str, int, int]:
    """Patient, index, class name, row and class of the first region of a query set."""
    regions = run.table("regions")
    there = regions[(regions.pixels > 0) & regions.slice.isin(run.query_slices(query_set))].iloc[0]
    about = run.slices.set_index("slice").loc[there.slice]
    class_id = int(there["class"])
    return about.patient, int(about["index"]), run.classes[class_id - 1], int(there.slice), class_id


def scores(run: Run, query_set: str, row: int, class_id: int) -> pd.DataFrame:
    """Influence and cosine on a query of every other train region that exists."""
    n, rates = len(run.train_slices), np.asarray(run.store.attributes("influence.zarr")["learning_rates"])
    position = run.query_slices(query_set).index(row)
    influence = run.store.read(f"influence.zarr/{query_set}")[class_id - 1, position].astype(float)
    mine, train = (
        np.sqrt(np.tensordot(rates, run.store.read(f"influence.zarr/norm2_{name}").astype(float), 1))
        for name in (query_set, "train")
    )
    with np.errstate(all="ignore"):
        cosine = influence / mine[class_id - 1, position] / train.ravel()
    table = pd.DataFrame({"influence": influence, "cosine": np.where(np.isfinite(cosine), cosine, np.nan)})
    table["slice"], table["class_id"] = np.tile(run.train_slices, 3), np.repeat((1, 2, 3), n)
    own = (table.slice == row) & (table.class_id == class_id)
    explainers = run.table("global_explainers")
    chosen = explainers[explainers.is_global & (explainers.query_class == class_id)]
    pairs = set(zip(chosen.train_slice, chosen.train_class, strict=True))
    regions = run.table("regions").set_index(["slice", "class"])
    table["overlap"] = [regions.overlap[z, j] for z, j in zip(table.slice, table.class_id, strict=True)]
    table["is_global"] = [pair in pairs for pair in zip(table.slice, table.class_id, strict=True)]
    return table[~own & ~np.isnan(influence)]


def check(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert len(found) > 0
    columns = ["slice", "class_id", "rank", "is_global", "overlap", "influence", "cosine"]
    left, right = (table[columns].reset_index(drop=True) for table in (found, expected))
    pd.testing.assert_frame_equal(left, right, check_dtype=False, rtol=1e-5, atol=1e-7)


def assert_ranked(found: RegionExplanation, table: pd.DataFrame, by: str, k: int, keep_global: bool) -> None:
    there = table.dropna(subset=by)
    orders = {
        "proponent": there.sort_values(by, ascending=False, kind="stable"),
        "neutral": there[~(there.overlap < 0.1)].sort_values(by, key=abs, kind="stable"),
        "opponent": there.sort_values(by, kind="stable"),
    }
    for name, ordered in orders.items():
        ranked = ordered.assign(rank=np.arange(1, len(ordered) + 1))
        ranked = ranked[{"proponent": ranked[by] > 0, "opponent": ranked[by] < 0}.get(name, slice(None))]
        check(found.rankings[name], ranked[keep_global | ~ranked.is_global].head(k))


@pytest.mark.parametrize("query_set", ["train", "test"])
@pytest.mark.parametrize("score", ["raw", "cosine"])
@pytest.mark.parametrize("keep_global", [False, True])
def test_rankings_are_those_of_the_tensor(planted: Run, query_set: str, score: str, keep_global: bool) -> None:
    config = planted.config.model_copy(update={"explainers": ExplainersConfig(score=score)})
    run = Run(RunStore(planted.uri), config)
    *where, row, class_id = first_region(run, query_set)
    found = explain_region(run, *where, k=7, keep_global=keep_global)
    table = scores(run, query_set, row, class_id)
    assert (found.query_set, found.slice, found.class_id, found.ranked_by) == (query_set, row, class_id, score)
    assert found.global_explainers == table.is_global.sum() + (query_set == "train" and row % 3 == 0) > 0
    assert_ranked(found, table, {"raw": "influence", "cosine": "cosine"}[score], 7, keep_global)


def test_features_that_link_are_the_predictive_ones_by_equation_7(planted: Run) -> None:
    *where, row, class_id = first_region(planted, "test")
    found = explain_region(planted, *where, k=5)
    assert found.features == FEATURES
    maxima = planted.store.read("features.zarr/maxima")
    for table in found.rankings.values():
        for line in table.to_dict("records"):
            expected = {}
            for k in FEATURES:
                a, b = maxima[row, class_id - 1, k], maxima[line["slice"], line["class_id"] - 1, k]
                if a or b:
                    expected[k] = a * b / max(abs(a), abs(b)) ** 2
            links = found.links(line, 2)
            assert dict(links) == pytest.approx(expected, rel=1e-5)
            assert [value for _, value in links] == pytest.approx(sorted(expected.values(), reverse=True), rel=1e-5)
            assert found.links(line, 1) == links[:1]


def test_what_is_not_computed_yet_is_said_and_the_rest_is_told(planted: Run) -> None:
    for name in ("global_explainers", "feature_trends"):
        (Path(planted.uri) / f"tables/{name}.parquet").unlink()
    *where, row, class_id = first_region(planted, "test")
    found = explain_region(planted, *where)
    assert [warning.split(":")[0] for warning in found.warnings][:2] == [
        "global explainers are not known yet",
        "predictive features are not known yet",
    ]
    assert (found.features, found.global_explainers) == ((), 0)
    assert found.proponents.influence.iloc[0] == scores_without_tables(planted, row, class_id).max()


def scores_without_tables(run: Run, row: int, class_id: int) -> np.ndarray:
    influence = run.store.read("influence.zarr/test")[class_id - 1, run.query_slices("test").index(row)]
    return influence[~np.isnan(influence)]


@pytest.mark.parametrize("with_features", [True, False])
def test_the_picture_has_neutral_regions_and_the_links(
    planted: Run, with_features: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_features:
        (Path(planted.uri) / "tables/feature_trends.parquet").unlink()
    found = explain_region(planted, *first_region(planted, "test")[:3])
    drawn, png = [], figures.render
    monkeypatch.setattr(figures, "render", lambda figure, dpi: drawn.append(figure) or png(figure, dpi))
    figures.draw_explanation(planted, found, tmp_path / "x.png", shown=3)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    panels, links = drawn[0].subfigs
    ranks = [f"{name} {rank}" for name, table in found.rankings.items() for rank in table["rank"].head(3)]
    modalities = len(planted.modalities)
    rows = [panels.axes[start : start + modalities] for start in range(0, len(panels.axes), modalities)]
    assert [axis.get_title() for axis in rows[0]] == list(planted.modalities)
    assert [row[0].get_ylabel().split("\n")[0] for row in rows] == ["query", *ranks]
    lines = [line for table in found.rankings.values() for line in table.head(3).to_dict("records")]
    slices = [found.slice, *(line["slice"] for line in lines)]
    regions = [found.class_id, *(line["class_id"] for line in lines)]
    for row, number, class_id in zip(rows, slices, regions, strict=True):
        outside = ~planted.store.read("regions.zarr/mask")[number, class_id - 1]
        for axis, image in zip(row, planted.images([number])[0], strict=True):
            np.testing.assert_allclose(axis.images[0].get_array()[outside, 0], (image[outside] + 1) / 2, atol=1e-6)
    for row, line in zip(rows[1:], lines, strict=True):
        assert f"{line['class_name']}, slice {line['index']}" in row[0].get_ylabel()
        assert row[0].get_ylabel().endswith(f"overlap {line['overlap']:.2f}")
    if not with_features:
        assert not links.axes
        return
    strip = links.axes[0]
    expected = np.concatenate(
        [table[["feature_2", "feature_0"]].head(3).to_numpy() for table in found.rankings.values()]
    )
    np.testing.assert_array_equal(np.ma.filled(strip.images[0].get_array(), np.nan), expected)
    assert [label.get_text() for label in strip.get_xticklabels()] == ["2", "0"]
    assert [label.get_text() for label in strip.get_yticklabels()] == ranks


def test_a_slice_is_read_once_for_all_its_modalities(
    planted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = explain_region(planted, *first_region(planted, "test")[:3])
    read, paths = RunStore.read, []
    monkeypatch.setattr(RunStore, "read", lambda store, path, where: paths.append(path) or read(store, path, where))
    figures.draw_explanation(planted, found, tmp_path / "x.png", shown=2)
    rows = 1 + sum(len(table.head(2)) for table in found.rankings.values())
    assert len(planted.modalities) > 1
    assert {path: paths.count(path) for path in paths} == {IMAGES: rows, LABELS: rows, MASKS: rows}


def test_features_of_listed_regions_are_read_side_by_side(planted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    where, read, reading, most = first_region(planted, "test")[:3], explanation.region_features, [], []
    expected = explain_region(planted, *where, k=8)

    def watched(*given: Any) -> torch.Tensor:
        reading.append(1)
        time.sleep(0.01)
        most.append(len(reading))
        reading.pop()
        return read(*given)

    monkeypatch.setattr(explanation, "region_features", watched)
    found = explain_region(planted, *where, k=8)
    assert max(most) > 1
    for name, table in expected.rankings.items():
        pd.testing.assert_frame_equal(found.rankings[name], table)


def plant_influence(run: Run, row: int, class_id: int, value: float) -> None:
    """Every influence that there is on a test region becomes a value."""
    array = zarr.open_array(f"{run.uri}/influence.zarr/test", mode="r+")
    where = (class_id - 1, run.query_slices("test").index(row))
    there = np.asarray(array[where])
    array[where] = np.where(np.isnan(there), np.nan, value)


def test_a_region_without_a_gradient_has_nothing_to_rank_and_is_drawn_alone(planted: Run, tmp_path: Path) -> None:
    *where, row, class_id = first_region(planted, "test")
    before = explain_region(planted, *where)
    assert not before.proponents.empty
    assert not any("nothing to rank" in warning for warning in before.warnings)
    plant_influence(planted, row, class_id, 0.0)
    for keep_global in (False, True):
        found = explain_region(planted, *where, keep_global=keep_global)
        assert {name: len(ranking) for name, ranking in found.rankings.items()} == {
            "proponent": 0,
            "neutral": 0,
            "opponent": 0,
        }
        assert "nothing to rank: every influence on this region is 0 or left out" in found.warnings
        assert list(found.proponents) == list(before.proponents)
    patient, index, class_name = where
    arguments = ["--patient", patient, "--index", str(index), "--class", class_name, "--out", str(tmp_path / "x.png")]
    done = CliRunner().invoke(app, ["explain", "--run", planted.uri, *arguments])
    assert done.exit_code == 0, done.output
    assert "warning: nothing to rank" in " ".join(done.output.split())
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_region_that_some_checkpoint_lacks_is_told_from_one_that_is_not_predicted(planted: Run) -> None:
    *where, row, class_id = first_region(planted, "test")
    plant_influence(planted, row, class_id, np.nan)
    regions = planted.config.regions.model_copy(update={"source": "checkpoint"})
    run = Run(RunStore(planted.uri), planted.config.model_copy(update={"regions": regions}))
    with pytest.raises(ValueError, match=r"not all of its checkpoints do \(regions\.source is checkpoint\)") as caught:
        explain_region(run, *where)
    assert "predicts no" not in str(caught.value)
    table = run.table("regions")
    table.loc[(table["slice"] == row) & (table["class"] == class_id), "pixels"] = 0
    table.to_parquet(Path(planted.uri) / "regions.parquet")
    with pytest.raises(ValueError, match=f"the network predicts no {where[2]} with more than 50% confidence"):
        explain_region(Run(RunStore(planted.uri), run.config), *where)


def test_a_region_that_the_checkpoints_alone_predict_is_told(planted: Run) -> None:
    *where, row, class_id = first_region(planted, "test")
    text = "the checkpoints predict this region, the final network doesn't"
    assert not any(warning.startswith(text) for warning in explain_region(planted, *where).warnings)
    table = planted.table("regions")
    chosen = (table["slice"] == row) & (table["class"] == class_id)
    table.loc[chosen, ["pixels", "overlap", "dice"]] = 0, np.nan, np.nan
    table.to_parquet(Path(planted.uri) / "regions.parquet")
    found = explain_region(planted, *where)
    assert not found.proponents.empty
    assert any(warning.startswith(text) for warning in found.warnings)


def test_where_whole_slices_are_differentiated_overlap_says_nothing(planted: Run) -> None:
    gradients = planted.config.gradients.model_copy(update={"score": "image"})
    run = Run(planted.store, planted.config.model_copy(update={"gradients": gradients}))
    table = run.table("regions")
    chosen = (table["pixels"] > 0) & (table["overlap"] < 0.1) & table["slice"].isin(run.query_slices("test"))
    low = table[chosen].iloc[0]
    row, class_id = int(low["slice"]), int(low["class"])
    mine = run.slices.set_index("slice").loc[row]
    where = mine.patient, int(mine["index"]), run.classes[class_id - 1]
    assert any(warning.startswith("only ") for warning in explain_region(planted, *where).warnings)
    array = zarr.open_array(f"{run.uri}/influence.zarr/test", mode="r+")
    position = class_id - 1, run.query_slices("test").index(row)
    columns = array.shape[2]
    array[position] = np.where(np.arange(columns) % 2, np.arange(columns) - columns / 2, 0)
    chosen = (table["slice"] == row) & (table["class"] == class_id)
    table.loc[chosen, ["pixels", "overlap", "dice"]] = 0, np.nan, np.nan
    table.to_parquet(Path(run.uri) / "regions.parquet")
    found = explain_region(run, *where, k=columns, keep_global=True)
    assert sorted(found.neutral["influence"]) == sorted(value for value in array[position] if value)
    assert not any(warning.startswith("only ") for warning in found.warnings)
    about, *_ = region_lines(found, keep_global=True)
    assert about.endswith("0 pixels, overlap –, region Dice – (test set)")


def test_what_a_patient_was_read_with_is_a_warning(planted: Run) -> None:
    *where, row, _ = first_region(planted, "test")
    *other, _, _ = first_region(planted, "train")
    path = Path(planted.uri) / "slices.parquet"
    slices = pd.read_parquet(path)
    slices.loc[slices["slice"] == row, "warnings"] = "left and right are a guess (LAS)"
    slices.to_parquet(path)
    run = open_run(planted.uri)
    text = "read with a warning: left and right are a guess (LAS)"
    assert text in explain_region(run, *where).warnings
    assert not any("read with" in warning for warning in explain_region(run, *other).warnings)


def test_a_case_of_no_query_set_is_told_by_its_split(tiny_run: Run) -> None:
    influence = tiny_run.config.influence.model_copy(update={"query_sets": ("test",)})
    run = Run(tiny_run.store, tiny_run.config.model_copy(update={"influence": influence}))
    patient, index, class_name, *_ = first_region(tiny_run, "train")
    with pytest.raises(UsageError, match=f"{patient} is a train case, and this run explains the test slices alone"):
        explain_region(run, patient, index, class_name)
