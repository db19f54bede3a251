"""The laws of stages: each key once, resumed where it stopped, damage done again, errors kept in their place."""

import errno
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY
from faulty import ARRAY, Square

from ray_tracin import stages
from ray_tracin import store as paths
from ray_tracin.faults import ended_after
from ray_tracin.integrity import verify
from ray_tracin.learning import Train
from ray_tracin.pipeline import Executors, run_to
from ray_tracin.preparation import Cut, Index, Inspect, TabulateSlices, usable_cases
from ray_tracin.presets import build_config
from ray_tracin.runs import Run, start_run
from ray_tracin.runtime import RayExecutor
from ray_tracin.stages import Event, Executor, Stage, StageError, complete, done_receipts, execute_serially
from ray_tracin.vocabulary import ReadError, SliceRange, UsageError


@dataclass(frozen=True)
class Chain(Square):
    """The same, in order."""

    name: ClassVar[str] = "chain"
    sequential: ClassVar[bool] = True


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start_run(tmp_path / "run", preset="demo")


def _complete(stage: Stage[Any], execute: Executor) -> list[Event]:
    events: list[Event] = []
    complete(stage, execute, events.append)
    return events


def _complete_on_ray(stage: Stage[Any]) -> list[Event]:
    with RayExecutor() as execute:
        return _complete(stage, execute)


EXPECTED = np.arange(12, dtype=np.float32) ** 2


def test_a_stage_is_done_once_and_then_nothing_is(run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {})
    events = _complete(stage, execute_serially)
    assert [event.kind for event in events] == ["begin", *["done"] * 6, "end"]
    assert np.array_equal(run.store.read(ARRAY), EXPECTED)
    assert done_receipts(stage)["000002-000004"].result == {"sum": 13.0}
    again = _complete(stage, execute_serially)
    assert [(event.kind, event.done) for event in again] == [("begin", 6), ("end", 6)]
    assert len(list(attempts.iterdir())) == 6


def test_damage_is_computed_again_and_nothing_else(run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {})
    _complete(stage, execute_serially)
    chunk = Path(run.uri) / "squares.zarr/x/c/3"
    chunk.write_bytes(b"x" * chunk.stat().st_size)
    (Path(run.uri) / "squares.zarr/x/c/5").unlink()
    (Path(run.uri) / "squares.zarr/x/zarr.json").write_text("{}")
    _complete(stage, execute_serially)
    assert [stage.tries(start) for start in range(0, 12, 2)] == [1, 1, 1, 2, 1, 2]
    assert np.array_equal(Run(type(run.store)(run.uri), run.config).store.read(ARRAY), EXPECTED)


def test_an_error_names_stage_and_key_and_keeps_what_was_done(run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {4: "value always"})
    with pytest.raises(ValueError, match="expected a number that can be squared") as caught:
        _complete(stage, execute_serially)
    assert caught.value.__notes__ == ["in stage square, key 000004-000006"]
    _complete(Square(run, attempts, {}), execute_serially)
    assert [stage.tries(start) for start in range(0, 12, 2)] == [1, 1, 2, 1, 1, 1]


def test_receipts_of_another_configuration_do_not_count(run: Run, attempts: Path) -> None:
    _complete(Square(run, attempts, {}), execute_serially)
    other = Square(Run(run.store, build_config("demo", None, ["seed=5"])), attempts, {})
    assert done_receipts(other) == {}


def test_a_checkpoint_that_comes_out_otherwise_is_refused_and_as_it_was_is_mended(
    patients: Path, tmp_path: Path
) -> None:
    overrides = [*TINY, f"data.root={patients}", "training={epochs: 2, adam_epochs: 1}", "influence.checkpoints=1"]
    run = start_run(tmp_path / "run", preset="demo", overrides=overrides)
    for stage in (Inspect(run), Index(run), Cut(run), TabulateSlices(run), Train(run)):
        _complete(stage, execute_serially)
    file, key = tmp_path / "run/checkpoints/epoch_02.pt", "epoch_02"
    final = tmp_path / "run/checkpoints/final.pt"
    whole, before = file.read_bytes(), run.store.read_receipt("train", key)
    assert before is not None
    row = run.train_slices[0]
    images = run.images([row])
    selection = (slice(row, row + 1), *(slice(0, length) for length in images.shape[1:]))
    # It is trained on something else now, as by a machine that rounds otherwise.
    run.store.write(paths.IMAGES, selection, -images)
    file.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"a file or the receipt of epoch_02 was lost .* restore checkpoints/epoch_02"
        ):
            _complete(Train(run), execute_serially)
        assert (file.read_bytes(), final.read_bytes()) == (b"damaged", whole), "nothing is written over"
        assert run.store.read_receipt("train", key) == before
    # The same without a receipt, once regions were made of the checkpoint, which then is the only evidence.
    receipt = tmp_path / f"run/{before.path}"
    text = receipt.read_bytes()
    receipt.write_bytes(b"")
    file.write_bytes(whole)
    run.store.write_bytes(paths.REGIONS, b"a table")
    with pytest.raises(ValueError, match=r"the receipt of epoch_02 was lost"):
        _complete(Train(run), execute_serially)
    assert file.read_bytes() == whole
    receipt.write_bytes(text)
    file.write_bytes(b"damaged")
    run.store.write(paths.IMAGES, selection, images)
    events = _complete(Train(run), execute_serially)
    assert [event.key for event in events if event.kind == "done"] == [key]
    assert file.read_bytes() == whole
    after = run.store.read_receipt("train", key)
    assert after is not None
    weights = [{stored for stored in receipt.files if "state" not in stored.path} for receipt in (before, after)]
    assert weights[0] == weights[1]


# Cases whose files change before slices are numbered


@pytest.fixture
def own_patients(patients: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(patients, tmp_path / "patients"))


def _cases(root: Path) -> list[Path]:
    return sorted((root / "HGG").iterdir())


def _start_on(root: Path) -> Run:
    return start_run(root.parent / "run", preset="demo", overrides=[*TINY, f"data.root={root}"])


def _inspected(run: Run) -> list[str]:
    """The cases that are inspected now."""
    return [event.key for event in _complete(Inspect(run), execute_serially) if event.kind == "done"]


def test_a_case_whose_file_is_replaced_is_inspected_again_until_slices_are_numbered(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    names = [folder.name for folder in folders]
    file = folders[0] / f"{names[0]}_t1.nii.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert _inspected(run) == names
    usable, skipped = usable_cases(run)
    assert [found.case.case for found in usable] == names[1:]
    assert [row["case"] for row in skipped] == names[:1]
    assert _inspected(run) == [], "a damaged file that is still there is not read again"
    file.write_bytes(whole)
    assert _inspected(run) == names[:1]
    usable, skipped = usable_cases(run)
    assert [found.case.case for found in usable] == names
    assert skipped == []
    _complete(Index(run), execute_serially)
    file.write_bytes(b"too late")
    assert _inspected(run) == []


def test_once_slices_are_numbered_it_does_not_matter_what_becomes_of_the_patients(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    names = [folder.name for folder in folders]
    (folders[0] / f"{names[0]}_t1.nii.gz").write_bytes(b"cut short")
    prepare = lambda: run_to(run, "prepare", Executors(execute_serially, execute_serially), lambda event: None)  # noqa: E731
    prepare()
    assert list(run.table("skipped")["case"]) == names[:1]
    assert sorted(map(str, Inspect(run).keys())) == names
    shutil.copytree(folders[1], own_patients / "LGG" / names[1])
    assert _inspected(run) == []
    (own_patients / "LGG").rename(own_patients / "BraTS19_NEW_1")
    for folder in folders[3:]:
        shutil.rmtree(folder)
    prepare()
    shutil.rmtree(own_patients)
    own_patients.mkdir()
    prepare()
    assert verify(run) == {}
    (Path(run.uri) / "receipts" / "inspect" / f"{names[1]}.json").unlink()
    assert list(verify(run)) == [f"inspect/{names[1]}"]


def test_what_was_inspected_for_another_configuration_is_no_key(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    _inspected(run)
    shutil.rmtree(folders[0])
    overrides = [*TINY, f"data.root={own_patients}", "split.validation=0.4"]
    run = start_run(run.uri, preset="demo", overrides=overrides)
    for _ in range(2):
        run_to(run, "prepare", Executors(execute_serially, execute_serially), lambda event: None)
    assert list(map(str, Inspect(run).keys())) == [folder.name for folder in folders[1:]]
    assert verify(run) == {}


def test_slices_are_not_numbered_otherwise_after_damage(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    executors = Executors(execute_serially, execute_serially)
    run_to(run, "prepare", executors, lambda event: None)
    cut, skipped = run.images([0, 3]), Path(run.uri) / "skipped.parquet"
    skipped.unlink()
    away = folders[0].rename(own_patients / "HGG.away")
    with pytest.raises(ValueError, match="lost or damaged, and .* holds other patients by now, .* put the patients"):
        run_to(run, "prepare", executors, lambda event: None)
    away.rename(folders[0])
    run_to(run, "prepare", executors, lambda event: None)
    assert np.array_equal(run.images([0, 3]), cut)
    assert skipped.exists()


def test_a_case_that_is_deleted_before_slices_are_numbered_is_forgotten(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    names = [folder.name for folder in folders]
    assert _inspected(run) == names
    shutil.rmtree(folders[2])
    assert _inspected(run) == []
    _complete(Index(run), execute_serially)
    receipt = run.store.read_receipt(Index.name, "slices")
    assert receipt is not None
    assert list(receipt.result["cases"]) == [*names[:2], *names[3:]]
    assert run.table("skipped").empty


def test_a_csv_file_that_is_mended_before_slices_are_numbered_counts(own_patients: Path, tmp_path: Path) -> None:
    listing = tmp_path / "dataset.csv"

    def list_patients(names: Sequence[str]) -> None:
        lines = ["case,patient,t1,t1ce,t2,flair,label"]
        for name, folder in zip(names, _cases(own_patients), strict=True):
            files = [str(folder / f"{folder.name}_{ending}.nii.gz") for ending in ("t1", "t1ce", "t2", "flair", "seg")]
            lines.append(",".join([folder.name, name, *files]))
        listing.write_text("\n".join(lines))

    list_patients([f"examination {n}" for n in range(6)])
    run = start_run(tmp_path / "run", preset="demo", overrides=[*TINY, f"data.root={listing}"])
    assert len(_inspected(run)) == 6
    list_patients(list("aabbcc"))
    _inspected(run)
    assert [found.case.patient for found in usable_cases(run)[0]] == list("aabbcc")


def test_a_link_to_nothing_is_told_as_such(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    file = folders[1] / f"{folders[1].name}_t1.nii.gz"
    file.unlink()
    file.symlink_to(own_patients / "annex" / "t1.nii.gz")
    with pytest.raises(FileNotFoundError) as caught:
        _inspected(run)
    assert str(caught.value).startswith(f"{file} is a link to {own_patients / 'annex' / 't1.nii.gz'}, which is not on ")


def test_strictly_no_examination_may_lack_the_segmentation_that_another_of_its_patient_has(own_patients: Path) -> None:
    for number, folder in enumerate(_cases(own_patients)[:2]):
        renamed = folder.rename(own_patients / f"BraTS-GLI-00001-00{number}")
        for path in renamed.iterdir():
            path.rename(renamed / path.name.replace(folder.name, renamed.name))
    (renamed / f"{renamed.name}_seg.nii.gz").unlink()
    overrides = [*TINY, f"data.root={own_patients}", "data.strict=true"]
    run = start_run(own_patients.parent / "run", preset="demo", overrides=overrides)
    _inspected(run)
    with pytest.raises(ValueError, match=r"^BraTS-GLI-00001-001 can't be used, and none may be left out: has no segm"):
        _complete(Index(run), execute_serially)


@pytest.mark.parametrize("asked", ["read_bytes", "stat"])
def test_a_case_whose_disk_fails_for_a_moment_is_not_skipped(
    own_patients: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    sound, stage = getattr(Path, asked), Inspect(run)
    keys = stage.keys()

    def fail(path: Path, **settings: Any) -> Any:
        if path.name.endswith("_t1.nii.gz"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sound(path, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Path, asked, fail)
        with pytest.raises(
            ReadError, match=r"_t1\.nii\.gz: can't be read on .* \(Input/output error\): check its disk"
        ):
            execute_serially(stage, keys, lambda key, attempt=None: None)
    assert _inspected(run) == [folder.name for folder in folders]
    assert usable_cases(run)[1] == []


def test_a_node_that_does_not_see_the_patients_fails_and_skips_none(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    stage = Inspect(run)
    keys = stage.keys()
    away = own_patients.rename(own_patients.with_name("elsewhere"))  # As where a disk is not mounted.
    with pytest.raises(FileNotFoundError, match="was there when the cases were listed, and is not on"):
        execute_serially(stage, keys, lambda key, attempt=None: None)
    assert run.store.receipts(Inspect.name) == {}
    away.rename(own_patients)
    assert _inspected(run) == [folder.name for folder in folders]


def test_a_stray_label_value_is_refused_with_a_case_that_has_it_and_mended_by_its_file(own_patients: Path) -> None:
    folders, run = _cases(own_patients), _start_on(own_patients)
    stray = folders[3].name
    file = folders[3] / f"{stray}_seg.nii.gz"
    whole, image = file.read_bytes(), nib.load(file)
    labels = np.asarray(image.dataobj).copy()
    labels[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(labels, image.affine), file)
    _inspected(run)
    with pytest.raises(ValueError, match="fit no BraTS edition") as caught:
        _complete(Index(run), execute_serially)
    assert str(caught.value).endswith(f"; 7 is in 1 of 6 cases, such as {stray}")
    file.write_bytes(whole)
    assert _inspected(run) == [stray]
    _complete(Index(run), execute_serially)


def test_test_queries_alone_are_refused_where_there_is_none(own_patients: Path) -> None:
    folders, settings = _cases(own_patients), ["split.validation=0", "influence.query_sets=[test]"]
    overrides = [*TINY, f"data.root={own_patients}", *settings]
    run = start_run(own_patients.parent / "run", preset="demo", overrides=overrides)
    _inspected(run)
    with pytest.raises(
        UsageError, match=r"query_sets=\[test\] expects test queries, .* split\.validation .* are 0, and"
    ):
        _complete(Index(run), execute_serially)
    next(folders[0].glob("*seg*")).unlink()
    _inspected(run)
    _complete(Index(run), execute_serially)
    receipt = run.store.read_receipt(Index.name, "slices")
    assert receipt is not None
    assert receipt.result["cases"][folders[0].name]["split"] == "test", "without ground truth it is a query"


@pytest.mark.ray
def test_the_pool_does_every_key_and_survives_what_happens(local_cluster: str, run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {2: "error", 6: "killed"})
    events = _complete_on_ray(stage)
    assert events[-1].done == events[-1].total == 6
    assert np.array_equal(run.store.read(ARRAY), EXPECTED)
    assert stage.tries(2) == 2
    assert stage.tries(6) == 2
    # A killed worker takes at most the keys in flight with it.
    assert sum(stage.tries(start) for start in range(0, 12, 2)) <= 6 + 1 + 2


@pytest.mark.ray
def test_an_epoch_that_this_process_does_not_see_is_the_last(
    local_cluster: str, run: Run, attempts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Chain(run, attempts)
    monkeypatch.setattr(stages, "SHARED_SECONDS", 0.0)
    # As where the task is on another node, and writes there.
    monkeypatch.setattr(run.store, "receipt_keys", lambda name: [])
    with pytest.raises(ValueError, match=r"have done 1 keys of stage chain, .*all nodes share"):
        _complete_on_ray(stage)


@pytest.mark.ray
def test_a_hung_key_goes_to_another_worker(local_cluster: str, run: Run, attempts: Path) -> None:
    hasty = Run(run.store, build_config("demo", None, ["resources.lease_seconds=3"]))
    stage = Square(hasty, attempts, {4: "hangs"})
    started = time.monotonic()
    _complete_on_ray(stage)
    assert np.array_equal(run.store.read(ARRAY), EXPECTED)
    assert stage.tries(4) == 2
    assert time.monotonic() - started < 40


@pytest.mark.ray
def test_failed_keys_are_listed_with_their_reasons_and_the_others_done(
    local_cluster: str, run: Run, attempts: Path
) -> None:
    stage = Square(run, attempts, {0: "value always", 8: "error always"})
    with pytest.raises(StageError) as caught:
        _complete_on_ray(stage)
    message = str(caught.value)
    assert message.startswith("stage square: 2 of 6 keys failed, the others are done and kept:")
    assert "000000-000002: expected a number that can be squared" in message
    assert "000008-000010: RuntimeError: the device is lost" in message
    assert len(done_receipts(stage)) == 4
    assert (stage.tries(0), stage.tries(8)) == (1, 3)  # what repeats is tried once, what may pass three times


@pytest.mark.parametrize("lease", ["1.0e+10", ".inf"])
def test_a_lease_may_be_as_long_as_anyone_likes(lease: str) -> None:
    config = build_config("demo", None, [f"resources.lease_seconds={lease}"])
    with ended_after(2 * config.resources.lease_seconds):
        pass


@pytest.mark.ray
def test_a_disk_that_fails_for_a_moment_is_asked_again(local_cluster: str, run: Run, attempts: Path) -> None:
    stage = Square(run, attempts, {4: "unread"})
    events = _complete_on_ray(stage)
    assert [event.detail for event in events if event.kind == "again"] == ["error: the disk did not answer"]
    assert stage.tries(4) == 2


@pytest.mark.ray
def test_keys_in_order_go_on_in_one_task_and_after_a_kill_in_another(
    local_cluster: str, run: Run, attempts: Path
) -> None:
    stage = Chain(run, attempts, {6: "killed"})
    events = _complete_on_ray(stage)
    done = [event.key for event in events if event.kind == "done"]
    assert done == [str(SliceRange(start, start + 2)) for start in range(0, 12, 2)]
    assert [stage.tries(start) for start in range(0, 12, 2)] == [1, 1, 1, 2, 1, 1]
    assert np.array_equal(run.store.read(ARRAY), EXPECTED)


@pytest.mark.ray
@pytest.mark.slow
def test_keys_in_order_go_on_after_an_error_that_passes_and_after_a_hang(
    local_cluster: str, run: Run, attempts: Path
) -> None:
    hasty = Run(run.store, build_config("demo", None, ["resources.lease_seconds=2"]))
    stage = Chain(hasty, attempts, {2: "error", 6: "hangs"})
    events = _complete_on_ray(stage)
    assert [stage.tries(start) for start in range(0, 12, 2)] == [1, 2, 1, 2, 1, 1]
    assert np.array_equal(run.store.read(ARRAY), EXPECTED)
    again = [event.detail for event in events if event.kind == "again"]
    assert again[0] == "error: RuntimeError: the device is lost"
    died = "its worker's process died: killed, crashed, out of memory, or hung (see resources.lease_seconds)"
    assert again[1] == f"lost: {died}"
    assert len(again) == 2


@pytest.mark.ray
def test_a_key_in_order_that_always_fails_is_tried_three_times_and_one_that_would_repeat_once(
    local_cluster: str, run: Run, attempts: Path
) -> None:
    stage = Chain(run, attempts, {4: "error always"})
    with pytest.raises(StageError, match="000004-000006: RuntimeError: the device is lost"):
        _complete_on_ray(stage)
    assert [stage.tries(start) for start in range(0, 12, 2)] == [1, 1, 3, 0, 0, 0]
    with pytest.raises(StageError, match="expected a number that can be squared"):
        _complete_on_ray(Chain(run, attempts, {4: "value always"}))
    assert stage.tries(4) == 4
