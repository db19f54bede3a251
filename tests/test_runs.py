import shutil
from pathlib import Path

import numpy as np
import pytest

from ray_tracin.runs import open_run, restore_configuration, start_run
from ray_tracin.soundness import file_problems
from ray_tracin.store import Receipt


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


def test_another_configuration_is_refused_with_every_difference(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run", preset="demo")
    run.store.write_receipt(Receipt("inspect", "case", run.fingerprint))
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
    begun.store.write_receipt(Receipt("inspect", "a", begun.fingerprint))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for root in (str(tmp_path / "patients"), "../patients"):
        assert start_run(tmp_path / "run", overrides=[f"data.root={root}"]).fingerprint == begun.fingerprint
    with pytest.raises(ValueError, match="has another configuration"):
        start_run(tmp_path / "run", overrides=["data.root=patients"])
