import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ray_tracin.claims import ClaimHeldError, driving
from ray_tracin.runs import Run, open_run, restore_configuration, start_run
from ray_tracin.soundness import file_problems
from ray_tracin.store import IncompleteRunError, Receipt
from ray_tracin.vocabulary import UsageError


def test_a_run_that_exists_needs_no_configuration_again(tmp_path: Path) -> None:
    first = start_run(tmp_path / "run", preset="demo", overrides=["seed=3"])
    assert start_run(tmp_path / "run").config == first.config
    assert open_run(tmp_path / "run").config == first.config
    assert start_run(tmp_path / "run", overrides=["resources.workers=1"]).config.resources.workers == 1


def test_before_anything_is_computed_the_configuration_may_be_mended(tmp_path: Path) -> None:
    start_run(tmp_path / "run", preset="demo", overrides=["data.root=/mistyped"])
    mended = start_run(tmp_path / "run", overrides=["data.root=/right"])
    assert open_run(tmp_path / "run").config == mended.config
    assert mended.config.data.root == "/right"


def test_what_was_only_inspected_may_still_be_configured_otherwise(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", preset="demo")
    for stage in ("inspect", "events"):
        run.store.write_receipt(Receipt(stage, "case", run.fingerprint))
    scheme = start_run(tmp_path / "run", overrides=["data.label_scheme=brats2024"])
    assert open_run(tmp_path / "run").config == scheme.config
    run.store.write_receipt(Receipt("index", "slices", scheme.fingerprint))
    with pytest.raises(ValueError, match="has another configuration"):
        start_run(tmp_path / "run", overrides=["data.label_scheme=brats2023"])


def test_the_configuration_is_not_mended_under_a_driver_that_is_about_to_compute(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", preset="demo", overrides=["seed=1"])
    with driving(run.store.objects), pytest.raises(ClaimHeldError, match="is being computed by process"):
        start_run(tmp_path / "run", overrides=["seed=2"])
    assert open_run(tmp_path / "run").config == run.config


def test_another_configuration_is_refused_with_every_difference(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", preset="demo")
    run.store.write_receipt(Receipt("index", "slices", run.fingerprint))
    message = r"has another configuration[\s\S]*model\.width: 8 → 16[\s\S]*seed: 0 → 9[\s\S]*give another --run"
    with pytest.raises(ValueError, match=message):
        start_run(tmp_path / "run", overrides=["seed=9", "model.width=16"])


def test_a_new_run_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run at .* yet: give --config FILE or --preset demo|paper"):
        start_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no configuration file at .*missing.yaml: expected a YAML file"):
        start_run(tmp_path / "run", config=tmp_path / "missing.yaml")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_opening_what_is_no_run_says_so_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run at .*/nothing: expected a folder with config\.yaml"):
        open_run(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_an_edited_configuration_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    start_run(tmp_path / "run", preset="demo")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(ValueError, match=r"config\.yaml was changed after the run began"):
        open_run(tmp_path / "run")
    config.write_text(text)
    versions = tmp_path / "run" / "versions.json"
    versions.write_text(versions.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(
        ValueError, match="has format 99, this ray_tracin reads format 1: use the release that wrote it"
    ):
        open_run(tmp_path / "run")


FORMAT_1 = Path(__file__).parent / "resources/format_1"


def test_a_run_of_format_1_as_the_first_release_wrote_it_still_opens(tmp_path: Path) -> None:
    run = open_run(FORMAT_1)
    assert run.config.data.root == "/data/patients"
    assert list(run.slices["patient"]) == ["A", "B"]
    np.testing.assert_array_equal(run.influence("train")[:, :, 0], [[1.0, 2.0]])
    assert np.isnan(run.influence("train")[:, :, 1]).all()
    receipts = [
        receipt for stage in ("slices", "layout", "influence") for receipt in run.store.receipts(stage).values()
    ]
    assert sorted(f"{receipt.stage}/{receipt.key}" for receipt in receipts) == [
        "influence/train/0-1",
        "influence/train/1-2",
        "layout/influence",
        "slices/slices",
    ]
    assert file_problems(run.store, receipts, check_bytes=True) == {}
    assert {receipt.fingerprint for receipt in receipts} == {run.fingerprint}


def test_a_run_of_format_1_goes_on_with_this_release(tmp_path: Path) -> None:
    uri = shutil.copytree(FORMAT_1, tmp_path / "run")
    assert start_run(uri).fingerprint == open_run(FORMAT_1).fingerprint
    (tmp_path / "run/config.yaml").write_bytes(b"")
    assert restore_configuration(uri) == ["config.yaml"]
    assert (tmp_path / "run/config.yaml").read_bytes() == (FORMAT_1 / "config.yaml").read_bytes()


def test_a_relative_folder_of_patients_is_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    begun = start_run(tmp_path / "run", preset="demo", overrides=["data.root=patients"])
    assert begun.config.data.root == str(tmp_path / "patients")
    begun.store.write_receipt(Receipt("index", "slices", begun.fingerprint))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for root in (str(tmp_path / "patients"), "../patients"):
        assert start_run(tmp_path / "run", overrides=[f"data.root={root}"]).fingerprint == begun.fingerprint
    with pytest.raises(ValueError, match="has another configuration"):
        start_run(tmp_path / "run", overrides=["data.root=patients"])


def test_a_relative_folder_in_a_file_is_as_seen_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study/patients").mkdir(parents=True)
    (tmp_path / "study/settings.yaml").write_text("data: {root: patients}\n")
    monkeypatch.chdir(tmp_path)
    for config in (tmp_path / "study/settings.yaml", Path("study/settings.yaml")):
        run = start_run(tmp_path / "run", config=config)
        assert run.config.data.root == str(tmp_path / "study/patients")


def test_a_run_is_not_begun_where_ray_unpacks_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    with pytest.raises(UsageError, match=r"--run my-run would be in .*_ray_pkg_0, where Ray .*: give an absolute path"):
        start_run("my-run", preset="demo")
    assert not list(unpacked.iterdir())
    start_run(tmp_path / "my-run", preset="demo")


def test_a_case_that_was_left_out_says_why(tiny_run: Run, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    run.store.write_table("skipped.parquet", pd.DataFrame({"case": ["P9"], "path": [""], "reason": ["no t1"]}))
    with pytest.raises(UsageError, match="^P9 was left out when the run was prepared: no t1$"):
        run.slices_of("P9")


def test_what_a_reader_does_changes_no_tensor(tiny_run: Run) -> None:
    tensor = open_run(tiny_run.uri).influence("train")
    before = np.asarray(tensor[...])
    with pytest.raises(ValueError, match="read-only"):
        tensor[0, 0, :] = 0.0
    np.testing.assert_array_equal(np.asarray(tiny_run.influence("train")[...]), before)


def test_a_network_that_is_not_there_names_those_that_are(tiny_run: Run) -> None:
    names = r"epoch_01, .*, epoch_08, final: `ray-tracin train .*` makes what is missing of its 8 epochs"
    with pytest.raises(FileNotFoundError, match=rf"has no checkpoints/epoch_99\.pt; it has {names}"):
        tiny_run.model(epoch=99)


def test_tables_have_their_names_and_others_are_listed(tiny_run: Run) -> None:
    pairs = tiny_run.table("influence")
    there = sum(int((~np.isnan(np.asarray(tiny_run.influence(name)[...]))).sum()) for name in tiny_run.query_sets)
    assert len(pairs) == there
    line = pairs.sample(1, random_state=0).iloc[0]
    rows, train = tiny_run.query_slices(line.query_set), tiny_run.train_slices
    column = (line.train_class - 1) * len(train) + train.index(line.train_slice)
    value = tiny_run.influence(line.query_set)[line.query_class - 1, rows.index(line.query_slice), column]
    assert float(np.asarray(value)) == line.influence
    with pytest.raises(IncompleteRunError, match=r"tables that are there: .*opponents, .*proponents.*slices"):
        tiny_run.table("nope")


@pytest.mark.parametrize("rows", [[0, 999], [-1]])
def test_rows_that_are_not_there_are_an_error(tiny_run: Run, rows: list[int]) -> None:
    for read in (tiny_run.images, tiny_run.labels):
        with pytest.raises(IndexError, match=f"expected rows from 0 to {len(tiny_run.slices) - 1}"):
            read(rows)


def test_a_configuration_in_other_bytes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=rf"{path}: expected YAML in UTF-8"):
        start_run(tmp_path / "run", config=path)


def test_an_empty_name_is_no_run() -> None:
    with pytest.raises(ValueError, match="got an empty name"):
        open_run("")
