"""The tables of explainers against a few lines of pandas, straight from ``influence.zarr``."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from ray_tracin.config import ExplainersConfig
from ray_tracin.datasets import execute_on_ray_data
from ray_tracin.explaining import (
    CountLists,
    RankPatients,
    RankQueries,
    TabulateGlobalExplainers,
    TabulateRankings,
    global_columns,
)
from ray_tracin.presets import build_config
from ray_tracin.runs import Run, open_run
from ray_tracin.stages import Executor, complete, execute_serially
from ray_tracin.store import RunStore

CLASSES, TRAIN, TEST = 3, 20, 4
TABLES = (
    *("global_explainers", "proponents", "opponents", "patient_proponents", "patient_opponents"),
    "proponent_classes",
)
STAGES = ("list-counts", "global-explainers", "rankings", "patient-rankings", "ranking-tables")
SMALL = ExplainersConfig(top_k=4, list_length=5, class_list=3, max_share=0.5)
QUERY = ["query_set", "query_slice", "query_class"]
REGION = ["train_class", "train_slice"]


@pytest.fixture
def copied(tiny_run: Run, tmp_path: Path) -> Run:
    """The tiny run, without anything of explainers."""
    root = tmp_path / "run"
    left_out = shutil.ignore_patterns("gradients.zarr", "tiles.zarr", "explainers", *STAGES)
    shutil.copytree(tiny_run.uri, root, ignore=left_out)
    for name in TABLES:
        (root / f"tables/{name}.parquet").unlink()
    return open_run(root)


def with_settings(run: Run, explainers: ExplainersConfig, query_sets: Sequence[str] = ("train", "test")) -> Run:
    influence = run.config.influence.model_copy(update={"query_sets": tuple(query_sets)})
    config = run.config.model_copy(update={"explainers": explainers, "influence": influence})
    return Run(RunStore(run.uri), config)


def explain(run: Run, execute: Executor = execute_serially) -> None:
    ranking = (CountLists(run), TabulateGlobalExplainers(run), RankQueries(run), RankPatients(run))
    for stage in (*ranking, TabulateRankings(run)):
        complete(stage, execute, lambda event: None)


def table(run: Run, name: str) -> pd.DataFrame:
    return pd.read_parquet(Path(run.uri) / f"tables/{name}.parquet")


def stored(run: Run, name: str) -> np.ndarray:
    return np.asarray(zarr.open_array(f"{run.uri}/influence.zarr/{name}", mode="r")[...])


def plant(run: Run, name: str, values: np.ndarray) -> None:
    zarr.open_array(f"{run.uri}/influence.zarr/{name}", mode="r+")[...] = values


def plant_ties(run: Run) -> None:
    """Small integers with ties, absent regions on both sides, and norms of which every cosine is an exact float."""
    random = np.random.default_rng(7)
    group = zarr.open_group(f"{run.uri}/influence.zarr", mode="r+")
    group.attrs["learning_rates"] = [0.5, 0.25]
    powers = {name: 4.0 ** random.integers(0, 4, (CLASSES, n)) for name, n in (("train", TRAIN), ("test", TEST))}
    powers["train"][0, 3] = 0  # A region without a gradient: its cosine is undefined.
    powers["train"][[0, 1, 2], [5, 0, 19]] = np.nan
    powers["test"][[1, 1], [0, 2]] = np.nan
    for name, norm2 in powers.items():
        # 0.5 · 4^k + 0.25 · (2 · 4^k) = 4^k.
        plant(run, f"norm2_{name}", np.stack([norm2, 2 * norm2]))
        influence = random.integers(-6, 7, (*norm2.shape, CLASSES * TRAIN)).astype(float)
        influence[:, :, 3] = 0
        if name == "train":
            influence[0, 3] = 0
        absent = np.isnan(norm2)[:, :, None] | np.isnan(powers["train"]).ravel()
        plant(run, name, np.where(absent, np.nan, influence))


def pairs(run: Run) -> pd.DataFrame:
    """Every pair of regions that exist, as a row; own ones left out."""
    group = zarr.open_group(f"{run.uri}/influence.zarr", mode="r")
    rates = np.asarray(group.attrs["learning_rates"])[:, None, None]
    slices = pd.read_parquet(Path(run.uri) / "slices.parquet").set_index("slice")
    train = np.asarray(group.attrs["train_slices"])
    frames = []
    for name in run.config.influence.query_sets:
        whole = stored(run, name)
        norm, train_norm = (np.sqrt((rates * stored(run, f"norm2_{side}")).sum(0)) for side in (name, "train"))
        with np.errstate(all="ignore"):
            cosine = (whole.astype(float) / (norm[:, :, None] * train_norm.ravel())).astype(np.float32)
        i, q, c = (axis.ravel() for axis in np.indices(whole.shape))
        frame = pd.DataFrame({"query_set": name, "query_class": i + 1, "column": c, "train_class": c // TRAIN + 1})
        frame["query_slice"] = np.asarray(group[name].attrs["query_slices"])[q]
        frame["train_slice"] = train[c % TRAIN]
        frame["influence"], frame["cosine"] = whole.ravel(), cosine.ravel()
        frames.append(frame[~((name == "train") & (c == i * TRAIN + q))])
    rows = pd.concat(frames).dropna(subset="influence")
    for side in ("query", "train"):
        rows[f"{side}_patient"] = slices.loc[rows[f"{side}_slice"], "patient"].to_numpy()
    return rows


def telling(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Without queries on which every influence is 0."""
    return rows[rows.groupby(QUERY)[by].transform(lambda values: (values.fillna(0) != 0).any())]


def ranked(rows: pd.DataFrame, by: str, falling: bool) -> pd.DataFrame:
    rows = (
        telling(rows, by)
        .dropna(subset=by)
        .sort_values([*QUERY, by, "column"], ascending=[True] * 3 + [not falling, True])
    )
    return rows.assign(rank=rows.groupby(QUERY).cumcount() + 1)


def expected_shares(rows: pd.DataFrame, by: str, settings: ExplainersConfig, over: str) -> pd.DataFrame:
    mine = rows[rows.query_set == over]
    queries = telling(mine, by).dropna(subset=by).groupby("query_class").query_slice.nunique()
    shares = {}
    for name, falling in (("share_proponent", True), ("share_opponent", False)):
        top = ranked(mine, by, falling).query(f"rank <= {settings.list_length}")
        shares[name] = top.groupby(["query_class", *REGION]).size() / queries
    regions = mine[REGION].drop_duplicates()
    every = regions.merge(pd.DataFrame({"query_class": range(1, CLASSES + 1)}), how="cross")
    every = every.sort_values(["query_class", *REGION]).set_index(["query_class", *REGION])
    for name, share in shares.items():
        every[name] = share
    there = every.index.get_level_values("query_class").isin(queries.index)
    every[there] = every[there].fillna(0)
    every["is_global"] = (every > settings.max_share).any(axis=1)
    return every.reset_index()


def expected_lists(rows: pd.DataFrame, by: str, falling: bool, shares: pd.DataFrame) -> pd.DataFrame:
    chosen = shares[["query_class", *REGION, "is_global"]]
    lists = ranked(rows, by, falling).merge(chosen, on=["query_class", *REGION], how="left")
    local = (~lists.is_global).groupby([lists[name] for name in QUERY]).cumsum()
    lists["local_rank"] = local.where(~lists.is_global, 0)
    lists["before"] = local - ~lists.is_global
    return lists


def compare(found: pd.DataFrame, expected: pd.DataFrame, columns: Sequence[str]) -> None:
    assert len(found) > 0
    left, right = (frame[list(columns)].reset_index(drop=True) for frame in (found, expected))
    pd.testing.assert_frame_equal(left, right, check_dtype=False, rtol=1e-6)


@pytest.mark.parametrize("score", ["raw", "cosine"])
@pytest.mark.parametrize("query_sets", [("train", "test"), ("train",)])
def test_every_table_is_what_pandas_makes_of_the_tensor(copied: Run, score: str, query_sets: tuple[str, ...]) -> None:
    plant_ties(copied)
    settings = SMALL.model_copy(update={"score": score, "max_share": 0.5 if "test" in query_sets else 0.2})
    run = with_settings(copied, settings, query_sets)
    explain(run)
    rows, by = pairs(run), {"raw": "influence", "cosine": "cosine"}[score]
    shares = expected_shares(rows, by, settings, query_sets[-1])
    found = table(run, "global_explainers")
    compare(found, shares, ["query_class", *REGION, "share_proponent", "share_opponent", "is_global"])
    assert set(found.query_set) == {query_sets[-1]}
    assert found.is_global.any()
    assert not found.is_global.all()
    for name, falling in (("proponents", True), ("opponents", False)):
        lists = expected_lists(rows, by, falling, shares)
        listed = table(run, name)
        columns = [*QUERY, "query_patient", *REGION, "train_patient", "influence", "cosine", "rank", "local_rank"]
        order = lambda frame: frame.sort_values([*QUERY, "rank"])  # noqa: E731
        compare(order(listed), order(lists[lists.before < settings.top_k]), [*columns, "is_global"])
        assert set(listed.ranked_by) == {score}
        if falling:
            top = lists[(lists.local_rank > 0) & (lists.local_rank <= settings.class_list)]
            counts = top.groupby(["query_set", "query_class", "train_class"]).size()
            classes = table(run, "proponent_classes").set_index(["query_set", "query_class", "train_class"])
            assert len(classes) == len(query_sets) * CLASSES**2
            assert classes["count"].tolist() == counts.reindex(classes.index, fill_value=0).tolist()
            assert np.allclose(classes["share"].groupby(level=[0, 1]).sum(), 1)


@pytest.mark.parametrize("score", ["raw", "cosine"])
def test_patients_are_ranked_by_the_sum_of_their_regions(copied: Run, score: str) -> None:
    plant_ties(copied)
    run = with_settings(copied, SMALL.model_copy(update={"score": score}))
    explain(run)
    by = {"raw": "influence", "cosine": "cosine"}[score]
    rows = pairs(run).merge(table(run, "global_explainers")[["query_class", *REGION, "is_global"]])
    kept = telling(rows, by)
    kept = kept[~kept.is_global]
    sums = kept.groupby([*QUERY, "train_patient"]).agg(
        influence=("influence", "sum"),
        influence_mean=("influence", "mean"),
        cosine=("cosine", lambda values: values.astype(float).sum(min_count=1)),
        cosine_mean=("cosine", lambda values: values.astype(float).mean()),
        regions=(by, "count"),
    )
    sums = sums.reset_index().dropna(subset=by)
    columns = [*QUERY, "train_patient", "influence", "cosine", "influence_mean", "cosine_mean", "regions", "rank"]
    for name, rising in (("patient_proponents", False), ("patient_opponents", True)):
        order = sums.sort_values([*QUERY, by, "train_patient"], ascending=[True] * 3 + [rising, True])
        expected = order.assign(rank=order.groupby(QUERY).cumcount() + 1)
        found = table(run, name).sort_values([*QUERY, "rank"])
        compare(found, expected[expected["rank"] <= SMALL.top_k], columns)
        assert set(found.ranked_by) == {score}


def test_tables_of_the_runs_own_tensor(copied: Run) -> None:
    """With the values of real gradients, the defaults, and a class that no test query has."""
    plant(copied, "test", np.where(np.arange(CLASSES)[:, None, None] == 1, np.nan, stored(copied, "test")))
    run = with_settings(copied, ExplainersConfig())
    explain(run)
    rows = pairs(run)
    shares = expected_shares(rows, "influence", run.config.explainers, "test")
    found = table(run, "global_explainers")
    compare(found, shares, ["query_class", *REGION, "share_proponent", "share_opponent", "is_global"])
    nothing = found[found.query_class == 2]
    assert len(nothing) > 0
    assert nothing[["share_proponent", "share_opponent"]].isna().all(axis=None)
    assert not nothing.is_global.any()
    assert (nothing.queries == 0).all()
    lists = expected_lists(rows, "influence", True, shares)
    order = [*QUERY, "rank"]
    top = lists[lists.before < 20].sort_values(order)
    compare(table(run, "proponents").sort_values(order), top, [*order, *REGION, "influence", "local_rank"])
    np.testing.assert_allclose(table(run, "proponents").sort_values(order).cosine, top.cosine, atol=1e-6)
    assert table(run, "proponents").cosine.abs().max() <= 1 + 1e-6
    empty = table(run, "proponent_classes").query("query_set == 'test' and query_class == 2")
    assert (empty["count"] == 0).all()
    assert empty["share"].isna().all()


def test_a_query_without_a_gradient_has_no_list_and_counts_nowhere(copied: Run) -> None:
    """Sorting its zeros would make the first columns the proponents and the opponents of everything."""
    tensor = np.random.default_rng(5).uniform(-1, 1, (CLASSES, TEST, CLASSES * TRAIN))
    tensor[0, :2] = 0
    plant(copied, "test", tensor)
    run = with_settings(copied, ExplainersConfig(list_length=5, top_k=3, class_list=2, max_share=1.0))
    explain(run)
    rows = run.query_slices("test")
    for name in ("proponents", "opponents", "patient_proponents", "patient_opponents"):
        mine = table(run, name).query("query_set == 'test' and query_class == 1")
        assert set(mine.query_slice) == set(rows[2:]), name
    shares = table(run, "global_explainers").query("query_class == 1")
    assert set(shares.queries) == {TEST - 2}
    assert np.isclose(shares.share_proponent.sum(), 5)
    classes = table(run, "proponent_classes").query("query_set == 'test' and query_class == 1")
    assert classes["count"].sum() == 2 * (TEST - 2)


def plant_blocks(run: Run) -> None:
    """Noise, with proponents and opponents of every test query that are no other's: shares of at most 1 in 4."""
    tensor = np.random.default_rng(3).uniform(0, 1, (CLASSES, TEST, CLASSES * TRAIN))
    for query in range(TEST):
        tensor[:, query, 5 * query : 5 * query + 5] += 10
        tensor[:, query, 30 + 5 * query : 35 + 5 * query] -= 10
    plant(run, "test", tensor)


def test_planted_global_explainers_are_found_and_left_out_and_none_is_invented(copied: Run) -> None:
    run = with_settings(copied, ExplainersConfig(list_length=5, top_k=3, class_list=2))
    plant_blocks(run)
    explain(run)
    assert not table(run, "global_explainers").is_global.any()
    tensor = stored(run, "test")
    tensor[:2, :, 58] = 100  # Everyone's proponent: position 18, class 3.
    tensor[2, :3, 21] = -100  # An opponent of three in four queries of class 3: position 1, class 2.
    plant(run, "test", tensor)
    for stage in STAGES:
        shutil.rmtree(Path(run.uri) / "receipts" / stage)
    explain(run)
    found = table(run, "global_explainers").query("is_global")
    train = run.train_slices
    assert found[["query_class", "train_slice", "train_class"]].to_numpy().tolist() == [
        [1, train[18], 3],
        [2, train[18], 3],
        [3, train[1], 2],
    ]
    assert found.share_proponent.tolist() == [1.0, 1.0, 0.0]
    assert found.share_opponent.tolist() == [0.0, 0.0, 0.75]
    assert np.argwhere(global_columns(run)).tolist() == [[0, 58], [1, 58], [2, 21]]
    mine = table(run, "proponents").query("query_set == 'test' and query_class == 1")
    assert mine["rank"].tolist() == [1, 2, 3, 4] * TEST
    assert mine["local_rank"].tolist() == [0, 1, 2, 3] * TEST
    assert mine["is_global"].tolist() == [True, False, False, False] * TEST
    classes = table(run, "proponent_classes").query("query_set == 'test' and query_class == 1")
    assert classes["count"].tolist() == [8, 0, 0], "the global explainer of class 3 is not counted"


def test_without_train_queries_there_is_no_cosine(copied: Run) -> None:
    plant_ties(copied)
    run = with_settings(copied, SMALL, ("test",))
    explain(run)
    proponents = table(run, "proponents")
    assert set(proponents.query_set) == {"test"}
    assert proponents.cosine.isna().all()
    assert proponents.influence.notna().all()
    message = r"explainers\.score is cosine, which needs .* add train to influence\.query_sets, got \['test'\]"
    with pytest.raises(ValueError, match=message):
        build_config("demo", None, ["explainers.score=cosine", "influence.query_sets=[test]"])


def files(run: Run) -> dict[str, bytes]:
    root = Path(run.uri)
    found = (*root.glob("tables/*.parquet"), *root.glob("explainers/**/*.parquet"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_running_twice_or_after_a_loss_gives_the_same_files(copied: Run) -> None:
    run = with_settings(copied, SMALL)
    explain(run)
    before = files(run)
    lost = ["tables/proponents.parquet", "explainers/rankings", "explainers/lists/test/000000-000004.parquet"]
    assert {f"tables/{name}.parquet" for name in TABLES} <= before.keys()
    (Path(run.uri) / lost[0]).unlink()
    (Path(run.uri) / lost[2]).unlink()
    explain(run)
    assert files(run) == before
    shutil.rmtree(Path(run.uri) / "receipts")
    explain(run)
    assert files(run) == before


@pytest.mark.ray
def test_ray_data_gives_the_same_files(local_cluster: str, copied: Run) -> None:
    run = with_settings(copied, SMALL)
    explain(run)
    before = files(run)
    shutil.rmtree(Path(run.uri) / "explainers")
    for name in TABLES:
        (Path(run.uri) / f"tables/{name}.parquet").unlink()
    explain(run, execute_on_ray_data)
    assert files(run) == before
