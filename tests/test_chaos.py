"""Minutes of kills, lost nodes and growing clusters, with real processes: ``pytest -m chaos``.

Clusters of several nodes need a process of their own each: a process has one connection to Ray.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ray.util import get_node_ip_address
from test_cli import ROOT, arrays_and_tables, drive, receipts_of, started_times

from ray_tracin.pipeline import stage_names
from ray_tracin.runs import Run

pytestmark = pytest.mark.chaos


def test_a_driver_killed_in_every_stage_ends_with_the_same_bits(tiny_run: Run, patients: Path, tmp_path: Path) -> None:
    """A kill for each stage: after a random number of its keys, and a random part of the time of the next one."""
    run, random = tmp_path / "run", np.random.default_rng(5)
    expected = {name: list(tiny_run.store.receipts(name).values()) for name in stage_names(tiny_run)}
    kept: dict[str, float] = {}
    again, cut_short = 0, set()
    for before, stage in pairwise([None, *expected]):
        done = int(random.integers(len(expected[stage])))
        driver = drive(run, patients)
        asked = (stage, done) if done or before is None else (before, len(expected[before]))
        _wait_for(partial(_has_receipts_or_ended, run, *asked, driver), 150)
        time.sleep(random.uniform(0, expected[stage][done].seconds))
        assert driver.poll() is None, driver.communicate()[1]
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        now = started_times(run)
        again += sum(now.get(key) != value for key, value in kept.items())
        cut_short |= {stage} if receipts_of(run, stage) < len(expected[stage]) else set()
        kept = now
    _, errors = (driver := drive(run, patients)).communicate(timeout=240)
    assert driver.returncode == 0, errors
    assert again == 0, "finished keys were computed again: what was in flight, a key a worker, is all that a kill costs"
    assert len(expected) >= 20
    # A stage whose only key takes milliseconds may have ended between the look and the kill.
    assert len(cut_short) >= 0.7 * len(expected), cut_short
    assert started_times(run).keys() == started_times(Path(tiny_run.uri)).keys()
    assert arrays_and_tables(run) == arrays_and_tables(Path(tiny_run.uri))


def _has_receipts_or_ended(run: Path, stage: str, count: int, driver: "subprocess.Popen[str]") -> bool:
    begun = any((run / "claims").glob("*.json"))
    return (begun and receipts_of(run, stage) >= count) or driver.poll() is not None


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run stands still"
        time.sleep(0.001)


def in_a_process(script: str, *arguments: object, seconds: float = 240, **environment: str) -> dict[str, Any]:
    """The last object that a script prints, as JSON; the whole group is ended in the end."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        _end_tree(process)
    assert process.returncode == 0, errors[-4000:]
    # Ray prints where it likes.
    return dict(json.loads([line for line in out.splitlines() if line.startswith("{")][-1]))


NODES = """
import json, logging, sys, time
from pathlib import Path
import numpy as np, ray
from ray.cluster_utils import Cluster
from faulty import ARRAY, Refusing, Square
from ray_tracin.presets import build_config
from ray_tracin.costs import collect_events
from ray_tracin.runs import Run, start_run
from ray_tracin.runtime import RayExecutor
from ray_tracin.stages import complete

folder, mode = Path(sys.argv[1]), sys.argv[2]
folder.mkdir()
(folder / "attempts").mkdir()
small = dict(object_store_memory=80 << 20)
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False, **small))
sick = {"env_vars": {"SICK": "1"}} if mode in ("sick", "refusing") else {}
sizes = [3] if mode == "between" else [1, 1]
nodes = [cluster.add_node(num_cpus=cpus, **small, **(sick if at else {})) for at, cpus in enumerate(sizes)]
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
run = start_run(folder / "run", preset="demo", overrides=["resources.lease_seconds=20"])
troubles = {start: "sick always" for start in range(0, 80, 2)}
kind = Refusing if mode == "refusing" else Square
stage = kind(run, folder / "attempts", troubles, length=40 if sick else 80, seconds=0.75)
seen, started = [], time.monotonic()

def listen(event):
    if event.kind != "done":
        return
    seen.append(len(stage.workers_seen()))
    if mode == "disturbed" and event.done == 8:
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1, **small)

with RayExecutor(elastic=True) as pool:
    complete(stage, pool, listen)
    if mode == "between":
        cluster.remove_node(nodes[0], allow_graceful=False)
        while any(node["Alive"] and node["Resources"].get("CPU") for node in ray.nodes()):
            time.sleep(0.2)
        cluster.add_node(num_cpus=1, **small)
        (folder / "later").mkdir()
        run = start_run(folder / "next", preset="demo")
        stage = Square(run, folder / "later", length=20)
        complete(stage, pool, lambda event: None)
seconds = time.monotonic() - started
events = collect_events(run, [stage.name])
print(json.dumps({
    "seconds": seconds,
    "same": bool(np.array_equal(run.store.read(ARRAY), stage.expected())),
    "extra": stage.tries() - len(stage.keys()),
    "counted": int((events.outcome != "done").sum()),
    "processes": len(stage.workers_seen()),
}))
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_is_lost_and_another_comes(tmp_path: Path) -> None:
    calm = in_a_process(NODES, tmp_path / "calm", "calm")
    assert (calm["same"], calm["extra"], calm["counted"], calm["processes"]) == (True, 0, 0, 2)
    disturbed = in_a_process(NODES, tmp_path / "disturbed", "disturbed")
    assert disturbed["same"]
    assert disturbed["processes"] == 3, "the new node has a worker"
    assert disturbed["extra"] <= 2, "what the lost worker had in hand"
    assert disturbed["counted"] == disturbed["extra"] or disturbed["counted"] == 1
    assert disturbed["seconds"] <= 2 * calm["seconds"], (disturbed, calm)


def test_nodes_that_go_between_two_stages_cost_nothing(tmp_path: Path) -> None:
    """Workers wait for the next stage on a node that is lost meanwhile: none of them could open it."""
    found = in_a_process(NODES, tmp_path / "between", "between")
    assert (found["same"], found["extra"], found["counted"], found["processes"]) == (True, 0, 0, 1)


def test_a_node_on_which_workers_keep_dying_gets_no_more_of_them(tmp_path: Path) -> None:
    found = in_a_process(NODES, tmp_path / "sick", "sick")
    assert found["same"], "no key lost all its tries to that node"
    assert (found["extra"], found["counted"]) == (3, 3)
    assert found["processes"] == 4, "three that died, and the one that did everything"


def test_a_node_on_which_no_worker_can_begin_is_left_to_itself(tmp_path: Path) -> None:
    found = in_a_process(NODES, tmp_path / "refusing", "refusing")
    assert (found["same"], found["extra"], found["counted"], found["processes"]) == (True, 0, 0, 1)


AUTOSCALED = """
import json, logging, os, sys, threading, time
from pathlib import Path
import numpy as np, ray
from faulty import ARRAY, GpuSquare
from ray_tracin.runs import start_run
from ray_tracin.runtime import RayExecutor
from ray_tracin.stages import complete

folder = Path(sys.argv[1])
(folder / "attempts").mkdir()
ray.init(address=sys.argv[2], log_to_driver=False, logging_level=logging.ERROR)
gpus = lambda: sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
before = gpus()
run = start_run(folder / "run", preset="demo", overrides=["resources.device=cuda"])
stage = GpuSquare(run, folder / "attempts", length=120, seconds=1.0)
seen = []
with RayExecutor(elastic=True) as pool:
    complete(stage, pool, lambda event: seen.append(gpus()))
deadline = time.monotonic() + 90
while gpus() and time.monotonic() < deadline:
    time.sleep(0.5)
print(json.dumps({
    "before": before, "most": max(seen), "after": gpus(), "extra": stage.tries() - len(stage.keys()),
    "same": bool(np.array_equal(run.store.read(ARRAY), stage.expected())), "processes": len(stage.workers_seen()),
}))
"""

FAKE_PROVIDER = {
    "cluster_name": "fake",
    "max_workers": 3,
    "upscaling_speed": 10,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "external",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "foreground_node_launch": True,
        "head_node_id": "f" * 51 + "00000",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {
            "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 3,
        },
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "docker": {},
}


def test_the_cluster_grows_from_no_gpu_to_three_and_back(tmp_path: Path) -> None:
    """The autoscaler's own fake provider starts real raylets; the demand is the pool's, nothing else asks."""
    config = tmp_path / "fake.yaml"
    port = 20000 + os.getpid() % 10000
    provider = {**FAKE_PROVIDER["provider"], "gcs_address": f"{get_node_ip_address()}:{port}"}  # type: ignore[dict-item]
    config.write_text(json.dumps({**FAKE_PROVIDER, "provider": provider}))  # JSON is YAML.
    head_id = FAKE_PROVIDER["provider"]["head_node_id"]  # type: ignore[index]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
    head = subprocess.Popen(
        [*command, f"--port={port}", f"--autoscaling-config={config}", f"--temp-dir=/tmp/ray-chaos-{os.getpid()}"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": str(head_id),
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": str(head_id),
        },
        stdout=(tmp_path / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_for(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), 60)
        found = in_a_process(AUTOSCALED, tmp_path, f"127.0.0.1:{port}")
    finally:
        _end_tree(head)
    assert found["same"]
    assert (found["before"], found["most"], found["after"]) == (0, 3, 0), found
    assert found["processes"] >= 3
    assert found["extra"] == 0


def _end_tree(process: "subprocess.Popen[Any]") -> None:
    """End a process and all that it started: those in sessions of their own, and those that it has left behind."""
    mine = process.pid
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(mine).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):
        os.killpg(mine, signal.SIGKILL)
    process.wait()
