"""The tables of features against numpy and pandas on what the run holds, and against networks that are really cut."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from conftest import TINY
from test_features import hard_dice

from ray_tracin import featuring
from ray_tracin.ablation import Ablate, TabulateImpact
from ray_tracin.features import classify_trend, feature_sets
from ray_tracin.integrity import verify
from ray_tracin.pipeline import STEPS, Executors, run_to
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.stages import Event, execute_serially
from ray_tracin.store import IncompleteRunError

STAGES = ("features", "feature-sums", "feature-tables", "ablation", "impact-tables")
TABLES = ("feature_importance", "feature_trends", "feature_impact", "feature_set_impact")


@pytest.fixture
def copied_run(tiny_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(tiny_run.uri, tmp_path / "copy")
    return open_run(tmp_path / "copy")


def finish(run: Run) -> list[str]:
    events: list[Event] = []
    run_to(run, STEPS[-1], Executors(execute_serially, execute_serially), events.append)
    return [event.stage for event in events if event.kind == "done"]


def forget(run: Run) -> None:
    """Undo the steps `features` and `ablation`."""
    root = Path(run.uri)
    for stage in STAGES:
        shutil.rmtree(root / "receipts" / stage)
        (root / f"receipts/layout/{stage}.json").unlink(missing_ok=True)
    shutil.rmtree(root / "features.zarr")
    for table in TABLES:
        (root / f"tables/{table}.parquet").unlink()


def contents(run: Run) -> dict[str, bytes]:
    root = Path(run.uri)
    files = [*(root / "features.zarr").glob("**/*"), *(root / "tables").glob("feature_*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.is_file()}


def hidden_maps(run: Run, row: int) -> tuple[np.ndarray, np.ndarray]:
    """What the final network's head reads on a slice, and what it makes of it."""
    model, held = run.model("final"), []
    model.head.register_forward_hook(lambda _, inputs, output: held.append((inputs[0], output)))
    with torch.no_grad():
        model(torch.from_numpy(run.images([row])))
    return tuple(part[0].numpy() for part in held[0])  # type: ignore[return-value]


def expected_maxima(run: Run, row: int) -> np.ndarray:
    maps, logits = hidden_maps(run, row)
    odds = np.exp(logits - logits.max(0))
    regions = (odds / odds.sum(0))[1:] > run.config.regions.threshold
    return np.stack([maps[:, mask].max(1) if mask.any() else np.full(len(maps), np.nan) for mask in regions])


def expected_importance(
    run: Run, maxima: np.ndarray, query_class: int, train_class: int
) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 8 (rank, feature), and how many queries each value is the mean of, by pandas' own ranks."""
    tensor = run.store.read("influence.zarr/test")[query_class - 1]
    n, classes = len(run.train_slices), len(run.classes)
    columns = [(j, z) for j in range(1, classes + 1) for z in run.train_slices]
    explainers = run.table("global_explainers")
    explainers = explainers[explainers["is_global"] & (explainers["query_class"] == query_class)]
    absent = set(zip(explainers["train_class"], explainers["train_slice"], strict=True))
    kept = [c for c, (j, z) in enumerate(columns) if train_class in (0, j) and (j, z) not in absent]
    found = np.full((len(tensor), classes * n, maxima.shape[2]), np.nan)
    for query, row in enumerate(run.query_slices("test")):
        if not np.nan_to_num(tensor[query]).any():
            continue  # On this query every influence is 0: nobody is ranked.
        mine = pd.Series(tensor[query, kept], index=kept).dropna()
        for column, rank in mine.rank(method="first", ascending=False).items():
            j, z = columns[int(str(column))]
            a, b = maxima[row, query_class - 1], maxima[z, j - 1]
            with np.errstate(invalid="ignore"):
                found[query, int(rank) - 1] = a * b / np.maximum(abs(a), abs(b)) ** 2
    counts = (~np.isnan(found)).sum(0)
    with np.errstate(invalid="ignore"):
        return np.nansum(found, axis=0) / counts, counts


def test_maxima_are_those_of_the_final_network_in_its_regions(tiny_run: Run) -> None:
    got = tiny_run.store.read("features.zarr/maxima")
    assert got.shape == (24, 3, 4)
    expected = np.stack([expected_maxima(tiny_run, row) for row in range(24)])
    assert np.isnan(expected).any()
    assert not np.isnan(expected).all()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert tiny_run.store.array("features.zarr/maxima").metadata.dimension_names == ("slice", "class", "feature")


def assert_importance(run: Run) -> None:
    table = run.table("feature_importance")
    columns = ["feature", "query_class", "train_class", "rank", "importance", "queries", "ranked_by"]
    assert list(table.columns) == columns
    assert set(table.ranked_by) == set(run.table("feature_trends").ranked_by) == {"raw"}
    maxima = np.stack([expected_maxima(run, row) for row in range(len(run.slices))])
    compared = 0
    for query_class in (1, 2, 3):
        for train_class in (0, 1, 2, 3):
            mine = table[(table.query_class == query_class) & (table.train_class == train_class)]
            expected, counts = expected_importance(run, maxima, query_class, train_class)
            assert len(mine) == (counts > 0).sum(), "ranks that no query has are absent"
            np.testing.assert_allclose(mine.importance, expected[mine["rank"] - 1, mine.feature], rtol=1e-4)
            assert np.array_equal(mine.queries, counts[mine["rank"] - 1, mine.feature])
            compared += len(mine)
    assert compared == len(table) > 0
    assert not table.duplicated(["feature", "query_class", "train_class", "rank"]).any()


def test_importance_is_the_mean_similarity_at_each_rank(tiny_run: Run) -> None:
    assert_importance(tiny_run)


def test_global_explainers_are_left_out_of_the_rankings(copied_run: Run) -> None:
    before = copied_run.table("feature_importance")
    path = Path(copied_run.uri) / "tables/global_explainers.parquet"
    explainers = pd.read_parquet(path)
    there = explainers.groupby("query_class")["train_slice"].transform("min") == explainers["train_slice"]
    explainers["is_global"] = there.where(explainers["query_class"] != 2, explainers["is_global"])
    assert 0 < explainers["is_global"].sum() < len(explainers)
    explainers.to_parquet(path)
    forget(copied_run)
    for stage in (featuring.MapFeatures, featuring.RankFeatures, featuring.TabulateFeatures):
        _complete(stage(copied_run))
    assert_importance(copied_run)
    after = copied_run.table("feature_importance")
    assert not after[after.query_class == 1].equals(before[before.query_class == 1])
    pd.testing.assert_frame_equal(*(table[table.query_class == 2].reset_index(drop=True) for table in (before, after)))


def _complete(stage: featuring.Stage) -> None:
    featuring_keys = list(stage.keys())
    stage.write_layout()
    execute_serially(stage, featuring_keys, lambda key: None)


def test_without_the_table_of_global_explainers_nothing_is_ranked(copied_run: Run) -> None:
    (Path(copied_run.uri) / "tables/global_explainers.parquet").unlink()
    with pytest.raises(IncompleteRunError, match=r"global_explainers\.parquet does not exist yet"):
        featuring.RankFeatures(copied_run).open()


def test_trends_are_those_of_the_curves_in_the_table(tiny_run: Run) -> None:
    trends, settings = tiny_run.table("feature_trends"), tiny_run.config.features
    assert len(trends) == 3 * 4 * 4
    curves = tiny_run.table("feature_importance").set_index(["query_class", "train_class", "feature"])
    for line in trends.itertuples():
        curve = np.full(60, np.nan, dtype=np.float32)
        key = (line.query_class, line.train_class, line.feature)
        if key in curves.index:
            mine = curves.loc[[key]]
            curve[mine["rank"] - 1] = mine["importance"]
        expected = classify_trend(torch.from_numpy(curve), settings)
        assert line.trend == expected.kind
        np.testing.assert_equal((line.slope, line.curvature), (expected.slope, expected.curvature))
        np.testing.assert_equal(line.importance_first, curve[0])
        shape = line.trend == "u_shaped" or (line.trend == "linear" and line.slope < 0)
        assert line.predictive == (shape and line.importance_first > 0.65)
    assert (trends["trend"] == "dead").any(), "a class that is never predicted"
    assert (trends["trend"] != "dead").any()


def expected_impact(
    run: Run, cut: tuple[int, ...], class_id: int, rows: Sequence[int] | None = None
) -> tuple[float, int]:
    """Eq. 9 by the network with filters whose normalisation is 0, run again."""
    rows = run.query_slices("test") if rows is None else rows
    whole, less = run.model("final"), run.model("final")
    norm = less.get_submodule("decoder.1.convolutions.norm2")
    with torch.no_grad():
        norm.weight[list(cut)] = 0
        norm.bias[list(cut)] = 0
        images = torch.from_numpy(run.images(rows))
        before, after = (model(images).argmax(1).numpy() for model in (whole, less))
    drops = []
    for y, without, truth in zip(before, after, run.labels(rows), strict=True):
        first, second = hard_dice(y, truth, class_id), hard_dice(without, truth, class_id)
        if not np.isnan(first):
            drops.append(first - (0.0 if np.isnan(second) else second))
    return (float(np.mean(drops)) if drops else np.nan), len(drops)


def test_impact_is_that_of_really_zeroing_every_filter(tiny_run: Run) -> None:
    table = tiny_run.table("feature_impact")
    assert list(table.columns) == ["feature", "class", "impact", "slices"]
    assert sorted(zip(table["feature"], table["class"], strict=True)) == [(k, i) for k in range(4) for i in (1, 2, 3)]
    for line in table.to_dict("records"):
        impact, slices = expected_impact(tiny_run, (line["feature"],), line["class"])
        assert line["impact"] == pytest.approx(impact, abs=1e-5, nan_ok=True)
        assert line["slices"] == slices
    assert (table["impact"].abs() > 1e-3).any()


def test_sets_of_predictive_features_are_masked_together(copied_run: Run) -> None:
    root = Path(copied_run.uri)
    trends = pd.read_parquet(root / "tables/feature_trends.parquet")
    pooled = trends["train_class"] == 0
    trends["predictive"] = pooled & (
        ((trends["query_class"] == 2) & trends["feature"].isin([1, 3]))
        | ((trends["query_class"] == 3) & (trends["feature"] == 0))
    )
    trends.to_parquet(root / "tables/feature_trends.parquet")
    for stage in STAGES[3:]:
        shutil.rmtree(root / "receipts" / stage)
    for step in (Ablate, TabulateImpact):
        _complete(step(copied_run))
    table = copied_run.table("feature_set_impact")
    assert set(table["class"]) == {2, 3}, "without a predictive feature there is nothing to compare"
    assert list(table["set"][table["class"] == 2]) == [
        "predictive",
        "others",
        *(f"random_{k}" for k in range(1, 21)),
    ]
    given = {2: ((1, 3), (0, 2)), 3: ((0,), (1, 2, 3))}
    for class_id, (predictive, others) in given.items():
        mine = table[table["class"] == class_id].set_index("set")
        for name, chosen in (("predictive", predictive), ("others", others)):
            assert mine.loc[name, "impact"] == pytest.approx(
                expected_impact(copied_run, chosen, class_id)[0], abs=1e-5, nan_ok=True
            )
            assert mine.loc[name, "size"] == len(chosen)
        assert (mine.filter(like="random", axis=0)["size"] == len(predictive)).all()
        seed = (copied_run.config.seed, *b"ablation", class_id)
        drawn = feature_sets(predictive, 4, 20, seed)["random_7"]
        assert mine.loc["random_7", "impact"] == pytest.approx(
            expected_impact(copied_run, drawn, class_id)[0], abs=1e-5, nan_ok=True
        )


def test_of_three_splits_the_impact_is_on_the_validation_slices(patients: Path, tmp_path: Path) -> None:
    split = ["split={validation: 0.17, test: 0.17}", "influence.query_sets=[train]"]
    run = start_run(tmp_path / "run", preset="demo", overrides=[*TINY, f"data.root={patients}", *split])
    run_to(run, "train", Executors(execute_serially, execute_serially), lambda event: None)
    for stage in (Ablate, TabulateImpact):
        _complete(stage(run))
    rows = {name: run.slices.loc[run.slices["split"] == name, "slice"].tolist() for name in ("validation", "test")}
    assert [len(found) for found in rows.values()] == [4, 4]
    differ = 0
    for line in run.table("feature_impact").to_dict("records"):
        found = {name: expected_impact(run, (line["feature"],), line["class"], rows[name]) for name in rows}
        assert line["impact"] == pytest.approx(found["validation"][0], abs=1e-5, nan_ok=True)
        assert line["slices"] == found["validation"][1]
        differ += found["validation"] != pytest.approx(found["test"], abs=1e-3, nan_ok=True)
    assert differ, "the test slices would give something else"


def _as_it_is(_: pytest.MonkeyPatch) -> None:
    pass


def _a_feature_at_a_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(featuring, "CHUNK_VALUES", 1)


@pytest.mark.parametrize("change", [_as_it_is, _a_feature_at_a_time])
def test_the_steps_give_the_same_again(
    copied_run: Run, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finish(copied_run) == []
    before = contents(copied_run)
    assert len(before) > 6
    forget(copied_run)
    change(monkeypatch)
    assert sorted(set(finish(copied_run))) == sorted(STAGES)
    after = contents(copied_run)
    tables = {path for path in before if path.startswith("tables")}
    same = before if change is _as_it_is else {path: before[path] for path in (*tables, "features.zarr/maxima/c/0/0/0")}
    if change is not _as_it_is:
        order = ["query_class", "train_class", "feature", "rank"]
        again = copied_run.table("feature_importance").sort_values(order, ignore_index=True)
        (Path(copied_run.uri) / "before.parquet").write_bytes(same.pop("tables/feature_importance.parquet"))
        first = pd.read_parquet(Path(copied_run.uri) / "before.parquet").sort_values(order, ignore_index=True)
        pd.testing.assert_frame_equal(again, first, check_exact=True)
    assert {path: after[path] for path in same} == same


def test_what_is_damaged_is_made_again_and_nothing_else(copied_run: Run) -> None:
    before = contents(copied_run)
    root = Path(copied_run.uri)
    (root / "features.zarr/sums/c/0/0/0/0").unlink()
    (root / "tables/feature_impact.parquet").write_bytes(b"x")
    assert sorted(verify(copied_run)) == ["feature-sums/test/000000-000004", "impact-tables/impact"]
    assert finish(open_run(root)) == ["feature-sums", "impact-tables"]
    assert contents(copied_run) == before
    assert verify(open_run(root)) == {}


def test_a_query_without_a_gradient_is_in_no_sum(copied_run: Run) -> None:
    """Its zeros would be ranked by the numbers of the columns."""
    before = copied_run.table("feature_importance")
    array = zarr.open_array(f"{copied_run.uri}/influence.zarr/test", mode="r+")
    tensor = np.asarray(array[...])
    telling = np.nan_to_num(tensor).any(axis=2).sum(axis=1)
    query_class = int(telling.argmax()) + 1
    assert telling[query_class - 1] > 1
    position = int(np.flatnonzero(np.nan_to_num(tensor[query_class - 1]).any(axis=1))[0])
    tensor[query_class - 1, position] *= 0
    array[...] = tensor
    forget(copied_run)
    for stage in (featuring.MapFeatures, featuring.RankFeatures, featuring.TabulateFeatures):
        _complete(stage(copied_run))
    assert_importance(copied_run)
    after = copied_run.table("feature_importance")
    most = [table.queries[table.query_class == query_class].max() for table in (before, after)]
    assert most == [telling[query_class - 1], telling[query_class - 1] - 1]
    kept = (table[table.query_class != query_class].reset_index(drop=True) for table in (before, after))
    pd.testing.assert_frame_equal(*kept)
