"""One trouble at a time, for real, beside the same work without it: what comes out, what was done twice, how long.

`test_pool` and `test_stages` hold the laws of each trouble on keys that take no time; here keys take some, so that the
price can be told.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from test_chaos import in_a_process
from test_cli import arrays_and_tables, drive, receipts_of, started_times

from ray_tracin.runs import Run, open_run

pytestmark = pytest.mark.slow

SPARE = 4 << 30
"""Bytes that the workers of a node may take before Ray ends one of them; `faulty` asks for far more, as what others
give back meanwhile is spare too."""

TROUBLED = """
import json, sys, time
from pathlib import Path
import numpy as np
from faulty import ARRAY, Square
from ray_tracin.costs import collect_events
from ray_tracin.runs import start_run
from ray_tracin.runtime import RayExecutor, cluster
from ray_tracin.stages import complete

def work(pool, name, length):
    folder = Path(sys.argv[1]) / name
    (folder / "attempts").mkdir(parents=True)
    lease = 60 if name == "fills" else 3  # To fill memory is not to pass for a hang.
    run = start_run(folder / "run", preset="demo", overrides=[f"resources={{workers: 2, lease_seconds: {lease}}}"])
    trouble = {} if name in ("first", "calm") else {10: name}
    stage = Square(run, folder / "attempts", trouble, length=length, seconds=0.2)
    again, started = [], time.monotonic()
    complete(stage, pool, lambda event: again.append(event.detail) if event.kind == "again" else None)
    seconds, events = time.monotonic() - started, collect_events(run, [stage.name])
    return {
        "seconds": seconds,
        "same": bool(np.array_equal(run.store.read(ARRAY), stage.expected())),
        "extra": stage.tries() - len(stage.keys()),
        "counted": int((events.outcome != "done").sum()),
        "again": again,
    }

with cluster("local", cpus=2), RayExecutor() as pool:
    work(pool, "first", 10)  # From here on both workers are there.
    print(json.dumps({name: work(pool, name, 300) for name in sys.argv[2:]}))
"""

LOST = {
    "killed": "lost: its worker's process died: killed, crashed, or out of memory",
    "hangs": "hung: did not finish within twice the lease",
    "fills": "lost: its worker was ended because the node ran out of memory",
}


IDEAL_SECONDS = 15.0
"""What the 150 keys take two workers that never wait."""

FILLING_SECONDS = 60.0
"""More than a worker takes to fill memory, by how fast the machine hands out pages; the lease is as long."""


def assert_cheap(trouble: str, found: dict[str, Any], longest: float) -> None:
    """The trouble struck, and cost no more than what workers had in hand, in no more than so many seconds."""
    assert found["same"]
    assert found["again"][0].startswith(LOST[trouble])
    # Ray may end a second worker before the memory of the first is seen to be free.
    assert 1 <= found["counted"] <= 2
    # A worker has the next of these short keys in hand too.
    assert 1 <= found["extra"] <= found["counted"] + 1
    assert found["seconds"] <= longest, found


def test_a_worker_that_is_killed_or_hangs_costs_a_key_or_two(tmp_path: Path) -> None:
    found = in_a_process(TROUBLED, tmp_path, "calm", "killed", "hangs")
    calm = found["calm"]
    assert (calm["same"], calm["extra"], calm["counted"]) == (True, 0, 0)
    for trouble in ("killed", "hangs"):
        assert_cheap(trouble, found[trouble], 2 * calm["seconds"])


@pytest.mark.chaos
def test_a_worker_that_takes_all_memory_is_ended_by_ray_and_costs_a_key_or_two(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 3 * SPARE:
        pytest.skip("needs 12 GiB of free memory")
    limit = str(min(0.95, (memory.total - memory.available + SPARE) / memory.total))
    limits = {"RAY_memory_usage_threshold": limit, "RAY_memory_monitor_refresh_ms": "100"}
    found = in_a_process(TROUBLED, tmp_path, "fills", **limits)
    assert_cheap("fills", found["fills"], 2 * IDEAL_SECONDS + FILLING_SECONDS)


KILLS = 5
DRAWN = ("figures", "pictures", "report")
"""The stages of what is looked at, which take as long as all tables."""
WORK = ("ray::PoolWorker.do", "ray::do_in_order", "ray::Map", "ray::_map_task")
"""How processes call themselves that are at a key: of the pool, of training, and of tables."""


def test_workers_of_a_run_that_are_killed_change_no_bit(tiny_run: Run, patients: Path, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", Path(tiny_run.uri)
    expected = {key for key in started_times(undisturbed) if key.split("/")[0] not in DRAWN}
    driver = drive(run, patients, "ablation")
    with _killing(driver.pid, run, len(expected)) as killed:
        _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors
    assert len(killed) == KILLS
    assert arrays_and_tables(run) == arrays_and_tables(undisturbed)
    assert started_times(run).keys() == expected
    events = open_run(run).table("events")
    in_vain = events[events.outcome != "done"]
    assert len(in_vain) <= len(killed), "a worker takes no more than its key with it"
    assert set(in_vain.outcome) <= {"lost"}


@contextmanager
def _killing(driver: int, run: Path, keys: int) -> Iterator[list[str]]:
    """Kill workers of a driver that are at a key, at random moments spread over the keys; yields whom it killed."""
    random, killed = np.random.default_rng(11), list[str]()
    moments = sorted(random.choice(range(2, keys - 2), KILLS, replace=False))

    def kill() -> None:
        for moment in moments:
            while receipts_of(run, "") < moment:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.1))
            while not (workers := _at_work(driver)) and psutil.pid_exists(driver):
                time.sleep(0.005)
            with suppress(psutil.NoSuchProcess, ValueError):
                victim = random.choice(np.array(workers, dtype=object))
                killed.append(" ".join(victim.cmdline()))
                os.kill(victim.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    thread.join(10)


def _at_work(driver: int) -> list[psutil.Process]:
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                found += [child] * " ".join(child.cmdline()).startswith(WORK)
    return found
