"""The command line as a user meets it: where the result is, and one clear message for every way to get it wrong."""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import nibabel
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import TINY
from typer.testing import CliRunner, Result

from ray_tracin.charts import COLOURS
from ray_tracin.claims import driving
from ray_tracin.cli import app
from ray_tracin.integrity import FOREIGN, verify
from ray_tracin.pipeline import STEPS
from ray_tracin.planning import PAGE_BYTES, plan_of
from ray_tracin.runs import Run, open_run
from ray_tracin.store import RunStore

ROOT = Path(__file__).parents[1]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def settings(*extra: str) -> list[str]:
    return [argument for value in (*TINY, *extra) for argument in ("--set", value)]


def prepare(root: Path, run: Path, *extra: str) -> Result:
    return invoke("prepare", "--run", str(run), "--preset", "demo", *settings(f"data.root={root}", *extra))


@pytest.fixture
def own_patients(patients: Path, tmp_path: Path) -> Path:
    """Patients that a test may damage."""
    return Path(shutil.copytree(patients, tmp_path / "patients"))


def case_files(root: Path, number: int) -> dict[str, Path]:
    case = sorted((root / "HGG").iterdir())[number]
    return {path.name.removeprefix(f"{case.name}_").removesuffix(".nii.gz"): path for path in case.iterdir()}


# Wrong usage and configuration: exit code 2, before anything starts.


def test_a_run_needs_a_configuration(tmp_path: Path) -> None:
    done = invoke("run", "--run", str(tmp_path / "run"))
    assert done.exit_code == 2
    assert "give --config FILE or --preset demo|paper" in done.stderr


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    done = invoke("run", "--run", str(tmp_path / "run"), "--preset", "demo", "--set", "training.lr=1")
    assert done.exit_code == 2
    assert "unknown setting 'training.lr'; known here: adam_epochs, adam_learning_rate" in done.stderr
    assert not (tmp_path / "run/config.yaml").exists()


def test_another_configuration_for_a_run_that_exists(tiny_run: Run) -> None:
    done = invoke("run", "--run", tiny_run.uri, "--set", "model.width=8")
    assert done.exit_code == 2
    assert re.search(r"has another configuration[\s\S]*model\.width: 4 → 8", done.stderr)


def test_commands_that_read_a_run_need_one(tmp_path: Path) -> None:
    for command in (["status"], ["verify"], ["explain", "--patient", "x", "--index", "1", "--class", "ED"]):
        done = invoke(*command, "--run", str(tmp_path / "none"))
        assert done.exit_code == 2
        assert "no run at" in done.stderr


def test_a_mistyped_run_leaves_no_folder(tmp_path: Path) -> None:
    for command in (["prepare"], ["plan"], ["repair"], ["sketches", "--set", "seed=1"]):
        done = invoke(*command, "--run", str(tmp_path / "none"))
        assert (done.exit_code, "no run at" in done.stderr) == (2, True)
    file = tmp_path / "file"
    file.touch()
    done = invoke("prepare", "--run", str(file))
    assert (done.exit_code, f"expected a folder at {file}, found a file" in done.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == [file]


def test_patients_that_are_not_there_are_missed_before_anything_starts(tmp_path: Path) -> None:
    """In this process, no cluster is there yet; the run begins, and another `data.root` may be given to it."""
    root = tmp_path / "missing"
    for set_root, message in (([], "data.root is not set"), ([f"data.root={root}"], f"{root} does not exist")):
        done = invoke("run", "--run", str(tmp_path / "run"), "--preset", "demo", *settings(*set_root))
        assert (done.exit_code, message in done.stderr) == (2, True)
        assert not done.stdout
    done = invoke("sketches", "--run", str(tmp_path / "run"), "--set", f"data.root={root}")
    assert (done.exit_code, f"{root} does not exist" in done.stderr, done.stdout) == (2, True, "")


# Bad data: one message, nothing lost.


@pytest.mark.ray
class TestBadData:
    @pytest.fixture(autouse=True)
    def _cluster(self, local_cluster: str) -> None:
        pass

    def test_the_demo_keeps_out_of_a_folder_that_is_somebodys(self, own_patients: Path, tmp_path: Path) -> None:
        (own_patients / "README_PHANTOM.txt").unlink()
        before = {path: path.read_bytes() for path in own_patients.rglob("*") if path.is_file()}
        for _ in range(2):  # The second goes on with a run that has this folder.
            done = invoke("demo", "--run", str(tmp_path / "run"), "--set", f"data.root={own_patients}")
            assert (done.exit_code, f"found other files in {own_patients}" in done.stderr) == (2, True)
            assert {path: path.read_bytes() for path in own_patients.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("empty folder", r"empty|no case|no patient"),
            ("no segmentations", r"segmentation"),
        ],
    )
    def test_a_root_without_usable_patients(self, own_patients: Path, tmp_path: Path, what: str, message: str) -> None:
        root = own_patients
        if what == "empty folder":
            root = tmp_path / "empty"
            root.mkdir()
        else:
            for path in root.glob("HGG/*/*_seg.nii.gz"):
                path.unlink()
        done = prepare(root, tmp_path / "run")
        # Another folder would help; or other data alone.
        assert done.exit_code == (2 if what == "empty folder" else 1)
        assert re.search(message, done.stderr)
        assert "Traceback" not in done.stderr
        assert str(root) in done.stderr

    def test_broken_cases_are_skipped_with_their_reasons(self, own_patients: Path, tmp_path: Path) -> None:
        case_files(own_patients, 0)["t2"].unlink()
        cut_short = case_files(own_patients, 1)["flair"]
        cut_short.write_bytes(cut_short.read_bytes()[:-200])
        other = case_files(own_patients, 2)["t1"]
        image = nibabel.load(other)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), other)
        done = prepare(own_patients, tmp_path / "run")
        assert done.exit_code == 0, done.stderr
        skipped = open_run(tmp_path / "run").table("skipped").set_index("case")["reason"]
        names = sorted(path.name for path in (own_patients / "HGG").iterdir())
        assert list(skipped.index) == names[:3]
        assert "t2" in skipped.iloc[0]
        assert "flair" in skipped.iloc[1]
        assert "shape" in skipped.iloc[2]
        assert len(open_run(tmp_path / "run").slices) == 3 * 4
        assert "3 cases were skipped" in done.stdout
        strict = prepare(own_patients, tmp_path / "strict", "data.strict=true")
        assert strict.exit_code == 1
        assert names[0] in strict.stderr

    def test_what_was_left_out_is_told_where_too_few_patients_are_left(
        self, own_patients: Path, tmp_path: Path
    ) -> None:
        names = sorted(path.name for path in (own_patients / "HGG").iterdir())
        for number in range(len(names) - 1):
            case_files(own_patients, number)["t2"].unlink()
        done = prepare(own_patients, tmp_path / "run")
        assert done.exit_code == 1
        assert re.search(r"expected at least 2 patients .* found 1: .*; 5 cases were left out", done.stderr)
        for name in names[:-1]:
            assert f"{name}: expected *_t2" in done.stderr
        case_files(own_patients, len(names) - 1)["seg"].unlink()
        again = prepare(own_patients, tmp_path / "again")
        assert again.exit_code == 1
        assert re.search(r"no case in .* has a segmentation.*; 5 cases were left out", again.stderr)

    @pytest.mark.parametrize(("value", "message"), [(7, "7"), (3, "resection cavity")])
    def test_labels_that_no_scheme_has(self, own_patients: Path, tmp_path: Path, value: int, message: str) -> None:
        seg = case_files(own_patients, 3)["seg"]
        image = nibabel.load(seg)
        labels = np.asarray(image.dataobj).copy()
        labels[labels == 2] = value
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), seg)
        done = prepare(own_patients, tmp_path / "run")
        assert done.exit_code == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_full_disk_keeps_what_was_computed(self, tiny_run: Run, patients: Path, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        size = "size=700k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        try:
            done = invoke("train", "--run", str(disk / "run"), "--preset", "demo", *settings(f"data.root={patients}"))
            assert done.exit_code == 1
            assert "no space left on the device" in done.stderr
            assert "Traceback" not in done.stderr
            kept = started_times(disk / "run")
            assert sum(key.startswith("cut/") for key in kept) == 6
            subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
            again = invoke("influence", "--run", str(disk / "run"))
            assert again.exit_code == 0, again.stderr
            now = started_times(disk / "run")
            assert {key: now[key] for key in kept} == kept, "nothing that was done is done again"
            assert is_the_tensor_of(tiny_run, disk / "run")
        finally:
            subprocess.run(["umount", str(disk)], check=True)


# What works.


def test_status_counts_every_key(tiny_run: Run) -> None:
    done = invoke("status", "--run", tiny_run.uri)
    assert done.exit_code == 0
    assert re.search(r"gradients\W+12\W+12", done.stdout)
    assert re.search(r"tiles\W+18\W+18", done.stdout)
    assert done.stdout.endswith("nobody computes it now\n")
    with driving(tiny_run.store.objects):
        assert f"being computed by process {os.getpid()} on " in invoke("status", "--run", tiny_run.uri).stdout


def test_the_version_is_told() -> None:
    done = invoke("--version")
    assert (done.exit_code, done.stdout.strip()) == (0, version("ray_tracin"))


def test_verify_says_that_all_is_well_or_what_is_not(tiny_run: Run) -> None:
    assert "is as it was written" in invoke("verify", "--run", tiny_run.uri).stdout
    victim = Path(tiny_run.uri) / "regions.parquet"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1])
    done = invoke("verify", "--run", tiny_run.uri)
    victim.write_bytes(data)
    assert done.exit_code == 1
    assert f"region-table/regions: regions.parquet: {len(data) - 1} bytes, expected {len(data)}" in done.stdout
    assert "1 damaged keys, 0 foreign files: run the same command again" in done.stderr


def test_verify_advises_what_mends_a_configuration(tiny_run: Run, tmp_path: Path) -> None:
    """Edited where it changes no answer, it is one that commands go on with, and never write anew."""
    run = Path(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("workers: 2", "workers: 3"))
    restores = f"1 damaged keys, 0 foreign files: `ray-tracin repair --run {run}` restores the configuration\n"
    assert invoke("verify", "--run", str(run)).stderr.endswith(restores)
    (run / "regions.parquet").unlink()
    again = "restores the configuration; run the same command again, which computes exactly the others anew\n"
    assert invoke("verify", "--run", str(run)).stderr.endswith(again)
    assert invoke("repair", "--run", str(run)).stdout.startswith("config.yaml: restored\n1 files mended")


def test_repair_counts_what_it_mends_and_names_are_told_as_they_are(tiny_run: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run.uri, tmp_path / "run[final]"))
    assert f"every file of {run} is as it was written" in invoke("verify", "--run", str(run)).stdout
    (run / "stray.csv").write_bytes(b"x")
    receipt = run / "receipts/train/epoch_08.json"
    whole = receipt.read_bytes()
    receipt.write_bytes(b"")
    assert "\n0 files mended" in invoke("repair", "--run", str(run)).stdout
    receipt.write_bytes(whole)
    assert invoke("repair", "--run", str(run)).stdout.startswith("stray.csv: deleted\n1 files mended")


def test_explain_ranks_what_the_tensor_says(tiny_run: Run) -> None:
    regions = tiny_run.table("regions")
    there = regions[(regions.pixels > 0) & regions.slice.isin(tiny_run.query_slices("test"))].iloc[0]
    row = tiny_run.slices.set_index("slice").loc[there.slice]
    name = tiny_run.classes[int(there["class"]) - 1]
    done = invoke(
        *("explain", "--run", tiny_run.uri, "--patient", row.patient, "--index", str(row["index"])),
        *("--class", name, "--top", "3", "--keep-global"),
    )
    assert done.exit_code == 0, done.stderr
    table = pd.read_parquet(Path(tiny_run.uri) / "tables/influence")
    mine = table[(table.query_set == "test") & (table.query_slice == there.slice)]
    mine = mine[mine.query_class.astype(int) == there["class"]].sort_values("influence")
    for influence in [*mine.influence.head(3), *mine.influence.tail(3)]:
        assert f"{influence:.4g}" in done.stdout
    assert f"{int(there.pixels)} pixels" in done.stdout


def test_explain_says_what_there_is_to_explain(tiny_run: Run) -> None:
    row = tiny_run.slices.iloc[0]
    ask = ["explain", "--run", tiny_run.uri, "--index", str(row["index"])]
    done = invoke(*ask, "--patient", row.patient, "--class", "WT")
    assert (done.exit_code, "no class 'WT'; classes of this run: NCR/NET, ED, ET" in done.stderr) == (2, True)
    done = invoke(*ask, "--patient", "nobody", "--class", "ED")
    assert (done.exit_code, "no patient 'nobody' in this run; there are 6" in done.stderr) == (2, True)
    done = invoke(*ask[:-1], "999", "--patient", row.patient, "--class", "ED")
    assert (done.exit_code, "has no slice at index 999; there are " in done.stderr) == (2, True)
    done = invoke(*ask, "--patient", row.patient, "--class", "ET")
    message = "predicts no ET with more than 50% confidence on this slice"
    assert (done.exit_code, message in done.stderr) == (2, True)


def test_plan_of_the_paper_says_what_it_takes() -> None:
    roomy = ["--set", "gradients.keep=false", "--set", "resources.memory_per_worker=64"]
    done = invoke("plan", "--preset", "paper", "--patients", "259", "--no-calibrate", *roomy)
    assert "3 × 2070 × 6210, 5 checkpoints" in done.stdout
    assert "31,044,292 of 31,044,292 differentiated" in done.stdout


def test_what_would_be_ignored_is_refused(tiny_run: Run, patients: Path) -> None:
    case = next((patients / "HGG").iterdir())
    done = invoke("query", "--run", tiny_run.uri, "--case", str(case), "--exact", "--size", "8")
    assert (done.exit_code, "no index: leave --size out" in done.stderr) == (2, True)
    done = invoke("plan", "--run", tiny_run.uri, "--patients", "5")
    assert (done.exit_code, "has its own patients: leave --patients out" in done.stderr) == (2, True)


def test_plan_refuses_what_does_not_fit_and_names_the_setting() -> None:
    done = invoke(
        "plan", "--preset", "paper", "--patients", "259", "--no-calibrate", "--set", "resources.memory_per_worker=2"
    )
    assert done.exit_code == 1
    assert re.search(r"a worker of gradients needs .* GiB, resources\.memory_per_worker is 2\.00 GiB", done.stderr)
    assert "influence.tile_slices" in done.stderr


def test_the_plan_covers_what_the_run_measured(tiny_run: Run) -> None:
    plan = plan_of(tiny_run)
    assert (plan.train, plan.test, plan.classes) == (20, 4, 3)
    root = Path(tiny_run.uri)
    shards = sum(path.stat().st_size for path in root.glob("gradients.zarr/epoch_07/*/c/**/*") if path.is_file())
    assert plan.shard_bytes <= shards <= 1.01 * plan.shard_bytes
    whole = sum(path.stat().st_size for path in root.glob("**/*") if path.is_file())
    assert whole <= plan.kept_bytes <= 1.3 * whole + PAGE_BYTES
    assert plan.tiles == len(tiny_run.store.receipts("tiles")) / 2


def test_plan_needs_to_know_how_many_patients() -> None:
    done = invoke("plan", "--preset", "paper")
    assert (done.exit_code, "Give data.root (--set data.root=…) or --patients N" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", [*STEPS, "pipeline"])
def test_jobs_are_the_commands(
    tiny_run: Run, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "jobs" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--run", tiny_run.uri, "--set", "seed=4"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(path, run_name="__main__")
    assert end.value.code == 2
    assert "seed: 0 → 4" in capsys.readouterr().err


def test_the_job_of_all_steps_is_the_command_run(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the last step's: `report` renders again, with pictures of patients, what was rendered without."""
    path = str(ROOT / "jobs/pipeline.py")
    for arguments, message in (
        (["--run", str(tmp_path / "new"), "--from", str(tmp_path / "none")], "no run at"),
        (["--run", tiny_run.uri, "--no-images"], "No such option"),
    ):
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        assert (end.value.code, message in capsys.readouterr().err) == (2, True)


def test_an_explanation_is_drawn(tiny_run: Run, tmp_path: Path) -> None:
    regions = tiny_run.table("regions")
    there = regions[regions.pixels > 0].iloc[0]
    row = tiny_run.slices.set_index("slice").loc[there.slice]
    ask = ["explain", "--run", tiny_run.uri, "--patient", row.patient, "--index", str(row["index"])]
    picture = tmp_path / "picture.png"
    done = invoke(*ask, "--class", tiny_run.classes[int(there["class"]) - 1], "--out", str(picture))
    assert done.exit_code == 0, done.stderr
    pixels = matplotlib.image.imread(picture)
    colour = np.asarray(matplotlib.colors.to_rgb(COLOURS[int(there["class"]) - 1]))
    # The region is painted over a slice: grey is mixed with its colour, so channels differ as they do in the colour.
    tinted = np.abs((pixels[..., 0] - pixels[..., 2]) - 0.45 * (colour[0] - colour[2])) < 0.02
    assert tinted.sum() > 10
    deeper = invoke(*ask, "--class", tiny_run.classes[int(there["class"]) - 1], "--out", str(tmp_path / "new/x.png"))
    assert deeper.exit_code == 0, deeper.stderr
    assert matplotlib.image.imread(tmp_path / "new/x.png").shape == pixels.shape
    for path in (tmp_path / "x.jpg", tmp_path / "new"):
        other = invoke(*ask, "--class", "ED", "--out", str(path))
        assert (other.exit_code, f"--out writes a .png file, got {path}" in other.stderr) == (2, True)
        assert "slice" not in other.stdout


# Killed and started again.


def drive(run: Path, root: Path, command: str = "run") -> subprocess.Popen[str]:
    """The command in a process group of its own, so that a kill takes Ray's processes with it."""
    configured = ["--run", str(run), "--preset", "demo", *settings(f"data.root={root}")]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ray_tracin.cli", command, *configured],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        # Who started the tests may ignore Ctrl-C, which processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def receipts_of(run: Path, stage: str) -> int:
    return len(list((run / "receipts" / stage).glob("**/*.json")))


KILLED_AFTER = 7
"""Tiles. `test_chaos` kills in all stages of a whole run; this one ends with the tensor, the dear part."""


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_where_it_was(tiny_run: Run, patients: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = drive(run, patients, "influence")
    deadline = time.monotonic() + 180
    while receipts_of(run, "tiles") <= KILLED_AFTER and driver.poll() is None:
        assert time.monotonic() < deadline, "tiles never began"
        time.sleep(0.003)
    time.sleep(np.random.default_rng(0).uniform(0, 0.05))
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = started_times(run)
    driver = drive(run, patients, "influence")
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 0, errors
    now = started_times(run)
    assert {key for key, value in kept.items() if now[key] != value} == set()
    assert is_the_tensor_of(tiny_run, run)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "stage"), [(signal.SIGINT, "cut"), (signal.SIGTERM, "train")])
def test_a_driver_that_is_interrupted_says_so_and_lets_the_run_go(
    patients: Path, tmp_path: Path, how: signal.Signals, stage: str
) -> None:
    run = tmp_path / "run"
    driver = drive(run, patients)
    deadline = time.monotonic() + 120
    while receipts_of(run, stage) < 2 and driver.poll() is None:
        assert time.monotonic() < deadline, f"{stage} never began"
        time.sleep(0.01)
    processes = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(how)
    _, errors = driver.communicate(timeout=60)
    assert (driver.returncode, errors) == (130, "error: interrupted; what is done is kept, the same command goes on\n")
    assert not list((run / "claims").iterdir())
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    # A table may be written for which no receipt vouches yet.
    assert set(verify(open_run(run))) <= {FOREIGN}


def started_times(run: Path) -> dict[str, float]:
    """When every finished key was begun."""
    store = RunStore(run)
    stages = [path.name for path in (run / "receipts").iterdir() if path.name != "events"]
    return {f"{stage}/{key}": receipt.started for stage in stages for key, receipt in store.receipts(stage).items()}


def arrays_and_tables(root: Path) -> dict[str, bytes]:
    kept = (*root.glob("*.zarr/**/*"), *root.glob("*.parquet"), *root.glob("tables/**/*"), *root.glob("checkpoints/*"))
    files = [path for path in kept if path.is_file() and "#" not in path.name and path.name != "events.parquet"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def is_the_tensor_of(undisturbed: Run, run: Path) -> bool:
    """Whether a run that ended with its tensor has every bit of one that went on from there."""
    mine, whole = arrays_and_tables(run), arrays_and_tables(Path(undisturbed.uri))
    assert mine == {path: whole[path] for path in mine}
    return mine.keys() >= {path for path in whole if path.startswith("influence.zarr/")}


def test_an_address_at_which_nobody_listens_is_refused_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        command = ["prepare", "--run", str(tmp_path / "run"), "--preset", "demo", "--address", address]
        command += ["--set", f"data.root={tmp_path}"]
        # A process of its own: this one may be connected to a cluster already.
        done = subprocess.run(
            [sys.executable, "-m", "ray_tracin.cli", *command], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode != 0
    assert f"no Ray cluster at '{address}'" in " ".join((done.stdout + done.stderr).split())


def test_wrong_values_are_told_as_such(tmp_path: Path) -> None:
    broken = CliRunner().invoke(app, ["plan", "--preset", "demo", "--set", "data.labels={a: b"])
    assert broken.exit_code == 2
    assert "is not valid YAML" in " ".join(broken.output.split())
    assert CliRunner().invoke(app, ["plan", "--preset", "demo", "--patients", "0"]).exit_code == 2
    missing = CliRunner().invoke(app, ["plan", "--config", str(tmp_path / "none.yaml"), "--patients", "5"])
    assert missing.exit_code == 2
    assert "expected a YAML file" in " ".join(missing.output.split())
