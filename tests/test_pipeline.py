"""The whole run against the contract of its files and an independent oracle; the same bits however it is run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import oracle
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
import torch
from conftest import TINY, branch
from test_querying import known_case

import ray_tracin
from ray_tracin.datasets import execute_on_ray_data
from ray_tracin.explanation import explain_region
from ray_tracin.integrity import verify
from ray_tracin.pipeline import STEPS, Executors, release_gradients, run_to, status
from ray_tracin.preparation import Cut
from ray_tracin.querying import EXACT, explain_scan
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.runtime import RayExecutor, cluster, planned_bytes
from ray_tracin.stages import Event, execute_serially
from ray_tracin.vocabulary import UsageError

SERIAL = Executors(execute_serially, execute_serially)


def finish(run: Run, step: str = STEPS[-1], executors: Executors = SERIAL) -> list[Event]:
    events: list[Event] = []
    run_to(run, step, executors, events.append)
    return [event for event in events if event.kind == "done"]


def tensor(run: Run, name: str) -> torch.Tensor:
    return torch.from_numpy(run.store.read(f"influence.zarr/{name}"))


def bits(run: Run) -> dict[str, bytes]:
    """Every array and table file of a run; receipts and events, which hold times, are left out."""
    root = Path(run.uri)
    kept = (*root.glob("*.zarr/**/*"), *root.glob("*.parquet"), *root.glob("tables/**/*"), *root.glob("checkpoints/*"))
    found = {str(path.relative_to(root)): path.read_bytes() for path in kept if path.is_file()}
    found.pop("events.parquet", None)
    return found


def expected_kernel(
    run: Run, epoch: int, rows: Sequence[int], names: Sequence[str], whole: bool
) -> dict[str, torch.Tensor]:
    images, labels = torch.from_numpy(run.images(rows)), torch.from_numpy(run.labels(rows)).long()
    masks = torch.from_numpy(run.store.read("regions.zarr/mask")[list(rows)])
    return oracle.gradients(run.model(epoch=epoch), names, images, labels, torch.ones_like(masks) if whole else masks)


def expected_tensor(
    run: Run, query_set: str, parameters: Sequence[str] | None = None, whole: bool = False
) -> torch.Tensor:
    """Eq. 6 in float64 by the oracle, with NaN where a region has no pixel."""
    table = pd.read_parquet(Path(run.uri) / "slices.parquet")
    rows = {"train": ["train"], "test": ["validation"]}
    train = table.loc[table.split.isin(rows["train"]), "slice"].tolist()
    query = table.loc[table.split.isin(rows[query_set]), "slice"].tolist()
    checkpoints = pd.read_parquet(Path(run.uri) / "checkpoints.parquet")
    total: torch.Tensor | float = 0.0
    for line in checkpoints[checkpoints.influence].itertuples():
        names = parameters or [name for name, _ in run.model(epoch=line.epoch).named_parameters()]
        sides = [expected_kernel(run, line.epoch, side, names, whole) for side in (query, train)]
        total = total + line.learning_rate * oracle.kernel(*sides)
    assert isinstance(total, torch.Tensor)
    if not whole:
        exists = torch.from_numpy(run.store.read("regions.zarr/mask")).flatten(2).any(2)
        missing = ~(exists[query].T[:, :, None, None] & exists[train].T[None, None])
        total[missing] = torch.nan
    return total.flatten(2)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert there.any()
    assert oracle.difference(got[there], expected[there]) < tolerance


@pytest.mark.parametrize("query_set", ["train", "test"])
def test_the_tensor_is_the_oracles(tiny_run: Run, query_set: str) -> None:
    expected = expected_tensor(tiny_run, query_set)
    assert expected.isnan().any(), "a class that is never predicted"
    assert_close(tensor(tiny_run, query_set), expected, 1e-5)


def test_the_train_tensor_is_symmetric_and_its_diagonal_the_norms(tiny_run: Run) -> None:
    whole = tensor(tiny_run, "train")
    matrix = whole.reshape(-1, whole.shape[2])
    assert torch.equal(matrix.nan_to_num(), matrix.T.nan_to_num())
    assert torch.equal(matrix.isnan(), matrix.T.isnan())
    rates = torch.tensor(tiny_run.store.attributes("influence.zarr")["learning_rates"])
    norms = (tensor(tiny_run, "norm2_train") * rates[:, None, None]).sum(0).flatten()
    torch.testing.assert_close(matrix.diagonal(), norms, equal_nan=True)


def test_norms_of_test_queries_are_those_of_their_gradients(tiny_run: Run) -> None:
    epoch = tiny_run.config.influence_epochs()[1]
    rows = tiny_run.query_slices("test")
    names = [name for name, _ in tiny_run.model(epoch=epoch).named_parameters()]
    gradients = expected_kernel(tiny_run, epoch, rows, names, whole=False)
    expected = sum(value.flatten(2).square().sum(2) for value in gradients.values())
    got = tensor(tiny_run, "norm2_test")[1].T
    there = ~got.isnan()
    torch.testing.assert_close(got[there].double(), torch.as_tensor(expected)[there], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("override", ["gradients.dtype=float16", "influence.tile_slices=6", "influence.tile_slices=20"])
def test_rows_that_are_made_give_the_bits_of_rows_that_are_stored(tiny_run: Run, tmp_path: Path, override: str) -> None:
    found = []
    for source in ("stored", "fused"):
        run = branch(tiny_run, tmp_path / source, override, f"gradients.source={source}")
        finish(run, "influence")
        found.append({path: value for path, value in bits(run).items() if not path.startswith("gradients.zarr")})
        assert (Path(run.uri) / "gradients.zarr").exists() == (source == "stored")
        assert verify(run) == {}
        assert [line.stage for line in status(run) if line.stage == "gradients"] == ["gradients"][: source == "stored"]
    assert found[0] == found[1]


def test_a_run_whose_rows_were_made_goes_on_without_storing_any(tiny_run: Run, tmp_path: Path) -> None:
    run = branch(tiny_run, tmp_path / "run", "influence.tile_slices=20", "gradients.source=fused")
    finish(run, "influence")
    events: list[Event] = []
    run_to(run, "export", Executors(execute_serially, execute_serially), events.append)
    assert {event.stage for event in events if event.kind == "done"} == {"export"}
    assert not (Path(run.uri) / "gradients.zarr").exists()


def test_shards_that_tiles_no_longer_want_are_freed_too(tiny_run: Run, tmp_path: Path) -> None:
    freed = ["gradients.keep=false", "gradients.source=fused"]
    run = branch(tiny_run, tmp_path / "run", "influence.checkpoints=1", *freed)
    finish(run, "gradients")
    stored = [receipt for receipt in run.store.receipts("gradients").values() if receipt.files]
    assert stored
    finish(run, "influence")
    receipts = run.store.receipts("gradients")
    assert len(receipts) == len(stored)
    assert all(receipt.released for receipt in receipts.values())
    assert not any((Path(run.uri) / file.path).exists() for receipt in stored for file in receipt.files)
    assert verify(run) == {}


def test_what_will_not_fit_is_refused_before_training(tiny_run: Run, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    shutil.rmtree(home / "receipts/train")
    run = start_run(home, overrides=["resources.memory_per_worker=0.2"])
    with pytest.raises(
        ValueError, match=r"would not fit:\n  a worker of gradients needs [\s\S]*\nwithout a new run only"
    ):
        finish(run, "influence")
    assert run.store.receipts("train") == {}


def test_a_damaged_table_of_slices_does_not_keep_workers_from_mending(tiny_run: Run, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    assert planned_bytes(Cut(open_run(home))) is not None
    for damage in (b"", (home / "slices.parquet").read_bytes()[:-3]):
        (home / "slices.parquet").write_bytes(damage)
        assert planned_bytes(Cut(open_run(home))) is None


VARIANTS = {
    "head": (["gradients.parameters=head"], ["head.weight"], False, 1e-5),
    "image": (["gradients.score=image"], None, True, 1e-5),
    "pattern": (["gradients.parameters=['head.*', 'encoder.0.*']"], None, False, 1e-5),
    "bfloat16": (["gradients.dtype=bfloat16"], None, False, 1e-2),
    "float16": (["gradients.dtype=float16"], None, False, 5e-5),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_by_the_same_path_equal_the_oracle(tiny_run: Run, tmp_path: Path, variant: str) -> None:
    overrides, names, whole, tolerance = VARIANTS[variant]
    run = branch(tiny_run, tmp_path / "run", *overrides)
    finish(run, "influence")
    if variant == "pattern":
        model = run.model("final")
        names = [name for name, _ in model.named_parameters() if name.startswith(("head.", "encoder.0."))]
        assert len(names) > 2
    if variant == "head":
        layout = json.loads(
            run.store.attributes(f"gradients.zarr/epoch_{run.config.influence_epochs()[0]:02d}")["layout"]
        )
        assert sum(np.prod(shape) for segment in layout["segments"] for shape in segment["shapes"]) == 4 * 4
    for query_set in ("train", "test"):
        assert_close(tensor(run, query_set), expected_tensor(run, query_set, names, whole), tolerance)


def test_plain_tracin_is_the_sum_over_both_classes(tiny_run: Run, tmp_path: Path) -> None:
    """Eq. 4 from eq. 5: with L = 1 − (1/C) Σ D_i, ⟨∇L, ∇L'⟩ is the sum of the terms over both classes, over C²."""
    run = branch(tiny_run, tmp_path / "run", "gradients.score=image")
    finish(run, "influence")
    epoch, rows = run.config.influence_epochs()[0], run.train_slices[:3]
    model = oracle.double(run.model(epoch=epoch))
    folder, cut = known_case(run)
    asked = explain_scan(run, folder, size=EXACT, k=3)
    assert len(asked.regions) == len(cut) * 3, "every slice and class"
    assert asked.regions["in_tensor"].all()
    losses = []
    for row in rows:
        logits = model(torch.from_numpy(run.images([row])).double())[0]
        labels = torch.from_numpy(run.labels([row])[0]).long()
        everywhere = torch.ones_like(labels, dtype=torch.bool)
        loss = 1 - sum(oracle.dice(logits, labels, everywhere, class_id) for class_id in (1, 2, 3)) / 3
        losses.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    expected = torch.stack(losses) @ torch.stack(losses).T
    kernel = tensor(run, "kernel_train")[0].double().unflatten(2, (3, -1))
    got = kernel.sum((0, 2))[:3, :3] / 9
    assert oracle.difference(got, expected) < 1e-5


def test_regions_of_each_checkpoint_are_another_tensor(tiny_run: Run, tmp_path: Path) -> None:
    run = branch(tiny_run, tmp_path / "run", "regions.source=checkpoint")
    finish(run, "influence")
    own, final = tensor(run, "train"), tensor(tiny_run, "train")
    both = ~(own.isnan() | final.isnan())
    assert both.any()
    assert not torch.allclose(own[both], final[both])
    assert run.store.attributes("regions.zarr")["source"] == "checkpoint"
    names = {"mask": "final", "mask_epoch_07": "checkpoint", "mask_epoch_08": "checkpoint"}
    assert {name: run.store.array(f"regions.zarr/{name}").attrs["source"] for name in names} == names
    table = run.table("regions")
    epochs = run.config.influence_epochs()
    folder, cut = known_case(run)
    asked = explain_scan(run, folder, size=EXACT, k=3)
    pixels = table.set_index(["slice", "class"])[["pixels", *(f"pixels_epoch_{epoch:02d}" for epoch in epochs)]] > 0
    in_tensor = pixels.drop(columns="pixels").all(axis=1)
    assert list(asked.regions["in_tensor"]) == list(in_tensor[in_tensor | pixels["pixels"]].loc[cut])
    always = np.all([table[f"pixels_epoch_{epoch:02d}"] > 0 for epoch in epochs], axis=0)
    positions = table["slice"].isin(run.train_slices)
    exists = always[positions.to_numpy()].reshape(-1, 3).T.reshape(-1)
    assert torch.equal(~own.reshape(len(exists), -1).isnan().all(1), torch.from_numpy(exists))


def test_files_keep_the_contract(tiny_run: Run) -> None:
    run, classes, epochs = ray_tracin.open_run(tiny_run.uri), 3, 2
    n, m = len(run.train_slices), len(run.query_slices("test"))
    assert (n, m) == (20, 4)
    expected = {
        "slices.zarr/images": ((24, 4, 32, 32), "float32", ("slice", "modality", "h", "w")),
        "slices.zarr/labels": ((24, 32, 32), "uint8", ("slice", "h", "w")),
        "regions.zarr/mask": ((24, 3, 32, 32), "bool", ("slice", "class", "h", "w")),
        "influence.zarr/train": ((classes, n, classes * n), "float32", ("query_class", "query", "train")),
        "influence.zarr/test": ((classes, m, classes * n), "float32", ("query_class", "query", "train")),
        "influence.zarr/kernel_train": (
            (epochs, classes, n, classes * n),
            "float32",
            ("checkpoint", "query_class", "query", "train"),
        ),
        "influence.zarr/norm2_test": ((epochs, classes, m), "float32", ("checkpoint", "query_class", "query")),
    }
    for path, (shape, dtype, dimensions) in expected.items():
        array = run.store.array(path)
        assert (array.shape, str(array.dtype), array.metadata.dimension_names) == (shape, dtype, dimensions), path
    images = run.store.array("slices.zarr/images").attrs
    assert images["modalities"] == ["t1", "t1ce", "t2", "flair"]
    assert images["classes"] == ["NCR/NET", "ED", "ET"]
    assert run.store.attributes("slices.zarr")["classes"] == ["NCR/NET", "ED", "ET"]
    about = run.store.attributes("influence.zarr")
    assert about["epochs"] == [7, 8]
    assert about["learning_rates"] == [0.01, 0.01]
    assert about["train_slices"] == list(run.train_slices)
    assert run.influence("test").attrs["query_slices"] == list(run.query_slices("test"))
    assert {name: about[name] for name in ("region_source", "score", "parameters")} == {
        "region_source": "final",
        "score": "region",
        "parameters": "all",
    }
    tables = ["regions", "tables/proponents", "tables/opponents", "tables/self_influence", "tables/feature_importance"]
    parts = Path(run.uri).glob("tables/influence/**/*.parquet")
    for path in (*(Path(run.uri) / f"{name}.parquet" for name in tables), *parts):
        said = json.loads(pq.read_schema(path).metadata[b"ray_tracin"])
        assert said.pop("unlabelled_slices") == [], path
        assert said.items() <= about.items(), path
    columns = {
        "slices.parquet": "slice patient grade split index pixels_1 pixels_2 pixels_3 source",
        "checkpoints.parquet": "epoch optimizer learning_rate file influence dice_train_1 dice_validation_3 loss",
        "regions.parquet": "slice class pixels overlap dice",
        "tables/self_influence.parquet": "self_influence rank",
        "tables/slice_self_influence.parquet": "train_slice patient regions self_influence self_influence_mean rank",
        "tables/patient_self_influence.parquet": "patient regions self_influence self_influence_mean rank rank_mean",
        "skipped.parquet": "case path reason",
    }
    for path, names in columns.items():
        assert set(names.split()) <= set(pd.read_parquet(Path(run.uri) / path).columns), path
    assert (
        torch.load(Path(run.uri) / "checkpoints/final.pt", weights_only=True).keys()
        == run.model("final").state_dict().keys()
    )
    assert sorted(path.name for path in (Path(run.uri) / "checkpoints").iterdir()) == [
        *(f"epoch_{epoch:02d}.pt" for epoch in range(1, 9)),
        "final.pt",
    ]


def test_the_exported_rows_are_the_tensor(tiny_run: Run) -> None:
    rows = pd.read_parquet(Path(tiny_run.uri) / "tables/influence")
    assert list(rows.columns) == ["query_slice", "train_slice", "train_class", "influence", "query_set", "query_class"]
    for query_set in ("train", "test"):
        whole = tensor(tiny_run, query_set).numpy()
        mine = rows[rows.query_set == query_set]
        assert len(mine) == (~np.isnan(whole)).sum()
        queries = {row: place for place, row in enumerate(tiny_run.query_slices(query_set))}
        trains = {row: place for place, row in enumerate(tiny_run.train_slices)}
        position = (
            mine.query_class.astype(int) - 1,
            mine.query_slice.map(queries),
            (mine.train_class - 1).astype(int) * len(trains) + mine.train_slice.map(trains),
        )
        assert np.array_equal(whole[tuple(np.asarray(axis, dtype=int) for axis in position)], mine.influence)


def test_self_influence_is_the_ranked_diagonal(tiny_run: Run) -> None:
    table = tiny_run.table("self_influence")
    whole = tensor(tiny_run, "train")
    diagonal = whole.reshape(-1, whole.shape[2]).diagonal().numpy()
    n = len(tiny_run.train_slices)
    position = (table.train_class - 1).astype(int) * n + table.train_slice.map(
        {r: i for i, r in enumerate(tiny_run.train_slices)}
    )
    np.testing.assert_allclose(table.self_influence, diagonal[position], rtol=1e-5)
    assert len(table) == (~np.isnan(diagonal)).sum()
    assert (table.self_influence.diff().dropna() <= 0).all()
    assert list(table["rank"]) == list(range(1, len(table) + 1))


@pytest.mark.parametrize(("name", "column"), [("slice", "train_slice"), ("patient", "patient")])
def test_self_influence_of_slices_and_patients_adds_up_their_regions(tiny_run: Run, name: str, column: str) -> None:
    whole = tensor(tiny_run, "train").double()
    diagonal = whole.reshape(-1, whole.shape[2]).diagonal().numpy()
    slices = tiny_run.slices.set_index("slice")["patient"]
    owner = np.tile(tiny_run.train_slices, 3) if name == "slice" else slices[np.tile(tiny_run.train_slices, 3)]
    regions = pd.Series(diagonal, index=np.asarray(owner)).dropna()
    found = tiny_run.table(f"{name}_self_influence").set_index(column)
    assert sorted(found.index) == sorted(set(regions.index))
    for who, line in found.iterrows():
        mine = regions[regions.index == who]
        assert line.regions == len(mine)
        np.testing.assert_allclose(
            [line.self_influence, line.self_influence_mean], [mine.sum(), mine.mean()], rtol=1e-5
        )
    assert list(found["rank"]) == list(range(1, len(found) + 1))
    assert found.self_influence.is_monotonic_decreasing
    assert found.sort_values("rank_mean").self_influence_mean.is_monotonic_decreasing
    assert sorted(found["rank_mean"]) == list(found["rank"])
    if name == "slice":
        assert (found.patient == slices[found.index]).all()


def test_running_again_computes_nothing_and_every_byte_is_accounted_for(tiny_run: Run) -> None:
    before = bits(tiny_run)
    assert finish(open_run(tiny_run.uri)) == []
    assert bits(tiny_run) == before
    assert verify(open_run(tiny_run.uri)) == {}
    assert all(line.done == line.total for line in status(open_run(tiny_run.uri)))


def test_verify_finds_damage_and_strays_and_the_next_run_mends_it(tiny_run: Run) -> None:
    root, before = Path(tiny_run.uri), bits(tiny_run)
    victims = [
        "influence.zarr/train/c/0/1/0",
        "checkpoints/epoch_07.pt",
        "slices.zarr/images/c/3/0/0/0",
        "regions.parquet",
    ]
    for victim in victims:
        data = bytearray((root / victim).read_bytes())
        data[len(data) // 2] ^= 16
        (root / victim).write_bytes(bytes(data))
    (root / "gradients.zarr/epoch_07/train/c/1/0").unlink()
    (root / "tables/stray.parquet").write_bytes(b"x")
    found = verify(open_run(tiny_run.uri))
    assert [problem.split(":")[0] for problem in found.pop("foreign")] == ["tables/stray.parquet"]
    assert sorted(problem.split(":")[0] for problems in found.values() for problem in problems) == sorted(
        [*victims, "gradients.zarr/epoch_07/train/c/1/0"]
    )
    (root / "tables/stray.parquet").unlink()
    done = finish(open_run(tiny_run.uri))
    assert [event.stage for event in done] == ["cut", "train", "region-table", "gradients", "influence"]
    assert bits(tiny_run) == before
    assert verify(open_run(tiny_run.uri)) == {}


@pytest.mark.slow
def test_shards_that_are_not_kept_are_freed_and_not_missed(tiny_run: Run, patients: Path, tmp_path: Path) -> None:
    overrides = [*TINY, f"data.root={patients}", "gradients.keep=false", "gradients.source=stored"]
    run = start_run(tmp_path / "run", preset="demo", overrides=overrides)
    finish(run)
    left = [path.name for path in (tmp_path / "run/gradients.zarr").glob("**/*") if path.is_file()]
    assert set(left) == {"zarr.json"}
    kept = {
        name: data for name, data in bits(tiny_run).items() if "gradients.zarr" not in name or name.endswith(".json")
    }
    assert bits(run) == kept
    assert finish(open_run(run.uri)) == []
    assert verify(open_run(run.uri)) == {}
    # A tile that is lost needs its checkpoint's shards again, and only those.
    (tmp_path / "run/tiles.zarr/epoch_08/train/c/0/1/0/0/0/0").unlink()
    (tmp_path / "run/influence.zarr/train/c/0/0/0").unlink()
    done = finish(start_run(run.uri, overrides=["gradients.keep=false", "gradients.source=stored"]))
    assert {event.key.split("/")[0] for event in done if event.stage == "gradients"} == {"epoch_08"}
    assert [event.stage for event in done if event.stage != "gradients"] == ["tiles", "influence"]
    assert bits(run) == kept


@pytest.mark.parametrize("keep", [True, False])
def test_the_evidence_of_shards_is_mended_though_no_tile_wants_them(tiny_run: Run, tmp_path: Path, keep: bool) -> None:
    home = Path(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    run = start_run(home, overrides=[f"gradients.keep={keep}"])
    if not keep:
        release_gradients(run, run.config.influence_epochs())
    for victim in (
        "receipts/gradients/epoch_07/train/000000-000004.json",
        "gradients.zarr/epoch_08/zarr.json",
    ):
        (home / victim).write_bytes(b"")
    (home / "receipts/layout/gradients.json").unlink()
    assert {"gradients/epoch_07/train/000000-000004", "layout/gradients"} <= verify(run).keys()
    finish(run, "influence")
    assert verify(run) == {}
    assert all(line.done == line.total for line in status(run))


def test_a_patient_without_ground_truth_is_a_query_and_says_so(patients: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(patients, tmp_path / "patients"))
    case = sorted((root / "HGG").iterdir())[0]
    (case / f"{case.name}_seg.nii.gz").unlink()
    run = start_run(tmp_path / "run", preset="demo", overrides=[*TINY, f"data.root={root}"])
    finish(run, "influence")
    table = run.slices
    mine = table[table.case == case.name]
    assert (mine.split == "test").all()
    assert not mine.labelled.any()
    queries = run.query_slices("test")
    assert set(mine.slice) <= set(queries)
    assert not set(mine.slice) & set(run.train_slices)
    assert run.influence("test").attrs["unlabelled_slices"] == list(mine.slice)
    regions = run.table("regions").merge(mine[["slice"]])
    there = regions[regions.pixels > 0]
    assert len(there) > 0
    assert (there.overlap == 1).all(), "the prediction stands in for the truth"
    explained = explain_region(run, case.name, *_first_region(run, there))
    assert "this slice has no ground truth: the network's own prediction stands in for it" in explained.warnings
    position = queries.index(explained.slice)
    row = tensor(run, "test")[explained.class_id - 1, position]
    assert explained.proponents.influence.iloc[0] == row[~row.isnan()].max().item()
    finish(run, "explainers")
    for name in ("proponents", "opponents"):
        ranked = run.table(name)
        assert (ranked.query_labelled != ranked.query_slice.isin(mine.slice)).all()
        assert not ranked.query_labelled.all()
    said = pq.read_schema(Path(run.uri) / "tables/global_explainers.parquet").metadata[b"ray_tracin"]
    assert json.loads(said)["unlabelled_slices"] == list(mine.slice)


def _first_region(run: Run, regions: pd.DataFrame) -> tuple[int, str]:
    first = regions.iloc[0]
    return int(run.slices.set_index("slice").loc[first.slice, "index"]), run.classes[int(first["class"]) - 1]


def test_an_address_of_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match="ray://head:10001 is an address of Ray Client"), cluster("ray://head:10001"):
        pass


@pytest.mark.slow
@pytest.mark.ray
def test_the_bits_do_not_depend_on_ray(local_cluster: str, tiny_run: Run, patients: Path, tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", preset="demo", overrides=[*TINY, f"data.root={patients}"])
    with RayExecutor() as pool:
        finish(run, "influence", Executors(pool, execute_serially))
    finish(run, "ablation", Executors(execute_serially, execute_on_ray_data))
    assert bits(run) == bits(tiny_run)
