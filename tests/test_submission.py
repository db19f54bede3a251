"""The whole of it, as users do: a cluster's head, jobs submitted to it, a run on S3, a job stopped in the middle."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cloud import environment, pointed_at, s3_server
from conftest import TINY
from ray.job_submission import JobStatus, JobSubmissionClient
from test_cloud import same_bits

from ray_tracin.integrity import verify
from ray_tracin.objects import Objects
from ray_tracin.pipeline import stage_names, status
from ray_tracin.planning import plan_of
from ray_tracin.runs import Run, open_run

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SECONDS = 300.0
URI = "s3://bucket/submitted"


@dataclass(frozen=True)
class Head:
    """A Ray cluster of one machine, and the environment in which its commands run."""

    address: str
    environment: dict[str, str]

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RAY, *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
        )

    def submit(self, name: str, *job: str, wait: bool = True, folder: str = ".") -> subprocess.CompletedProcess[str]:
        options = ["--submission-id", name, "--working-dir", folder, *([] if wait else ["--no-wait"])]
        return self.ray("job", "submit", "--address", self.address, *options, "--", *job)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def head(server: str) -> Iterator[Head]:
    """`ray start --head` with free ports and a folder of its own; its processes, and no others, end with it."""
    gcs, dashboard, agent, client, metrics = _free_ports(5)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # A job says `python`.
    variables |= {**environment(server), "PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        more = [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", f"--temp-dir={folder}"]
        options = ["--num-cpus=2", "--object-store-memory=134217728", "--dashboard-host=127.0.0.1", "--block"]
        process = subprocess.Popen(
            [*RAY, "start", "--head", *ports, *more, *options],
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _until(lambda: _answers(address), 90)
            yield Head(address, variables)
        finally:
            _end(process)


def _answers(address: str) -> bool:
    try:
        JobSubmissionClient(address).list_jobs()
    except (ConnectionError, RuntimeError):
        return False
    return True


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


@pytest.mark.slow
def test_a_job_is_stopped_in_the_middle_and_goes_on_when_submitted_again(
    head: Head, server: str, tiny_run: Run, patients: Path
) -> None:
    settings = [argument for value in (*TINY, f"data.root={patients}") for argument in ("--set", value)]
    job = ["python", "jobs/pipeline.py", "--run", URI, "--preset", "demo", *settings]
    client = JobSubmissionClient(head.address)
    submitted = head.submit("first", *job, wait=False)
    assert submitted.returncode == 0, submitted.stderr
    with pointed_at(server):
        held = Objects(URI)

        def in_the_middle() -> bool:
            assert client.get_job_status("first") != JobStatus.FAILED, client.get_job_logs("first")
            return len(held.sizes("receipts")) > 20

        _until(in_the_middle, SECONDS)
        stopped = head.ray("job", "stop", "--address", head.address, "first")
        assert stopped.returncode == 0, stopped.stderr
        assert client.get_job_status("first") == JobStatus.STOPPED
        before = len(held.sizes("receipts"))
        again = head.submit("second", *job)
        assert again.returncode == 0, again.stdout + again.stderr
        assert f": {URI}\n" in again.stdout
        assert "validation Dice after epoch 8" in again.stdout
        assert client.get_job_info("second").driver_exit_code == 0
        assert before < len(held.sizes("receipts"))
        assert held.sizes("claims") == {}
        assert same_bits(URI, tiny_run)
        logs = client.get_job_logs("second")  # As `ray job logs` shows it, without the colours of its own lines.
        assert "Traceback" not in logs
        assert "\x1b" not in logs, "no bars where there is no terminal"
        assert "tiles: " in logs
        computed = [line for line in logs.splitlines() if line.endswith(" computed")]
        assert "0 computed" in computed[0], "what the first job did is kept"


@pytest.mark.chaos
def test_the_whole_demo_is_stopped_in_the_middle_and_ends_whole(head: Head, server: str, tmp_path: Path) -> None:
    """At its own size: 28 patients that the job itself makes, gigabytes of gradients on S3.

    It is submitted again from another folder, as after an edit or to another cluster: the job's own folder differs.
    """
    uri, client = "s3://bucket/demo", JobSubmissionClient(head.address)
    job = ["python", "-m", "ray_tracin.cli", "demo", "--run", uri]
    assert head.submit("demo", *job, wait=False).returncode == 0
    with pointed_at(server):
        held = Objects(uri)

        def half_of_the_gradients_are_there() -> bool:
            assert client.get_job_status("demo") not in (JobStatus.FAILED, JobStatus.SUCCEEDED)
            return len(held.sizes("receipts/gradients")) > GRADIENT_KEYS // 2

        _until(half_of_the_gradients_are_there, SECONDS)
        assert head.ray("job", "stop", "--address", head.address, "demo").returncode == 0
        assert client.get_job_status("demo") == JobStatus.STOPPED
        before = _started(uri)
        shutil.copytree(ROOT / "ray_tracin", tmp_path / "ray_tracin")
        again = head.submit("demo-again", *job, folder=str(tmp_path))
        assert again.returncode == 0, again.stdout + again.stderr
        assert client.get_job_info("demo-again").driver_exit_code == 0
        logs = client.get_job_logs("demo-again")
        assert f": {uri}\n" in logs
        assert f"the report, for a browser: {uri}/report/index.html" in logs
        assert "Traceback" not in logs
        after, run = _started(uri), open_run(uri)
        assert before.items() <= after.items(), "nothing that was done is done again"
        assert f"\nin all {len(after) - len(before)} " in re.sub(" +", " ", logs)
        assert verify(run) == {}
        assert all(line.done == line.total for line in status(run))
        events, plan = run.table("events"), plan_of(run)
        assert (events.outcome != "done").sum() <= 2 * 2, "what two workers had in hand when the job was stopped"
        most = max(need.host for need in (plan.memory.gradients, plan.tile_need, plan.memory.stripes))
        peaks = events[events.stage.isin(["gradients", "tiles", "influence"])].groupby("stage").peak_memory.max()
        assert len(peaks) == 3
        assert (peaks <= most).all(), (peaks, most)


GRADIENT_KEYS = 70
"""Of the demo: 14 shards for each of five checkpoints."""


def _started(uri: str) -> dict[str, float]:
    """When every finished key of a stage was begun."""
    run = open_run(uri)
    stages = {name: run.store.receipts(name) for name in stage_names(run)}
    return {f"{name}/{key}": receipt.started for name, held in stages.items() for key, receipt in held.items()}


@pytest.mark.slow
def test_a_job_that_cant_begin_fails_with_a_message_and_its_code(head: Head) -> None:
    done = head.submit("wrong", "python", "jobs/pipeline.py", "--run", "s3://bucket/none", "--set", "sede=1")
    assert done.returncode == 1
    assert "unknown setting 'sede'" in done.stdout + done.stderr
    info = JobSubmissionClient(head.address).get_job_info("wrong")
    assert (info.status, info.driver_exit_code) == (JobStatus.FAILED, 2), json.dumps(info.metadata)
