"""One driver a run: exactly one of many gets it, a living one is refused to others, a dead one is let go."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from cloud import pointed_at, s3_server

from ray_tracin import claims
from ray_tracin.claims import ClaimHeldError, ClaimLostError, Holder, driving, is_claim
from ray_tracin.objects import Objects
from ray_tracin.pipeline import Executors, run_to
from ray_tracin.runs import start_run
from ray_tracin.stages import execute_serially


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url, pointed_at(url):
        yield url


@pytest.fixture(params=["disk", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "disk":
        return Objects(tmp_path / "run")
    request.getfixturevalue("server")
    return Objects(f"s3://bucket/{tmp_path.name}")


def held_elsewhere(objects: Objects, number: int = 1) -> Holder:
    """A claim from a machine whose processes can't be seen."""
    holder = replace(Holder.this_process(), host="far-away", machine="another", pid=4711, job="raysubmit_x")
    objects.put(f"claims/{number:06d}.json", json.dumps(holder.__dict__).encode())
    return holder


def test_a_second_driver_is_refused_and_told_who_holds_the_run(objects: Objects) -> None:
    with driving(objects), pytest.raises(ClaimHeldError, match=rf"computed by process {os.getpid()} on .*, since 20"):
        driving(objects).__enter__()
    assert objects.sizes() == {}
    with driving(objects) as claim:
        claim.check()


def test_of_many_at_once_exactly_one_gets_it(objects: Objects) -> None:
    start = threading.Barrier(8)

    def attempt(stack: ExitStack) -> bool:
        start.wait()
        try:
            stack.enter_context(driving(objects))
        except ClaimHeldError:
            return False
        return True

    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, [stack] * 8)) == 1
        assert sum(is_claim(path) for path in objects.sizes()) == 1


def test_a_driver_that_was_killed_is_let_go_at_once(objects: Objects) -> None:
    code = (
        "import sys, time; from ray_tracin.claims import driving; from ray_tracin.objects import Objects\n"
        "with driving(Objects(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, objects.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ClaimHeldError, match=f"process {process.pid} on"):
        driving(objects).__enter__()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    with driving(objects) as claim:  # Dead, though nobody has asked how it died, as in a container without an init.
        claim.check()
    assert time.monotonic() - began < 5
    process.wait()


def test_a_far_driver_is_watched_until_it_moves_or_expires(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "STALE_SECONDS", 3.0)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.3)
    held_elsewhere(objects)
    beating = threading.Timer(1.5, held_elsewhere, [objects])
    beating.start()
    with pytest.raises(ClaimHeldError, match=r"process 4711 on far-away, job raysubmit_x, since"):
        driving(objects).__enter__()
    beating.join()
    began = time.monotonic()
    with driving(objects) as claim:
        claim.check()
        assert list(objects.sizes("claims")) == ["claims/000002.json"]
    assert 1 < time.monotonic() - began < 8


def test_a_stale_claim_is_taken_at_once_by_the_clock_of_the_storage(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "run")
    held_elsewhere(objects)
    long_ago = time.time() - 2 * claims.STALE_SECONDS
    os.utime(tmp_path / "run/claims/000001.json", (long_ago, long_ago))
    began = time.monotonic()
    with driving(objects):
        assert time.monotonic() - began < 1


def test_a_claim_that_cant_be_read_holds_until_it_expires(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.3)
    objects.put("claims/000007.json", b"{")
    with driving(objects):
        assert [path for path in objects.sizes() if is_claim(path)] == ["claims/000008.json"]


def test_who_was_taken_over_stops_before_its_next_key(
    patients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(tmp_path / "run", preset="demo", overrides=[f"data.root={patients}", "data.size=32"])
    seen = []

    def listen(event: object) -> None:
        seen.append(event)
        if len(seen) == 2:
            held_elsewhere(run.store.objects, 2)
            monkeypatch.setattr(claims, "STALE_SECONDS", -1.0)  # A heartbeat is due now.

    with pytest.raises(ClaimLostError, match=r"was taken over by process 4711 on far-away, job raysubmit_x"):
        run_to(run, "prepare", Executors(execute_serially, execute_serially), listen)
    assert len(seen) == 2
    assert "claims/000002.json" in run.store.objects.sizes(), "the other's claim is left alone"


def test_a_driver_that_slept_leaves_the_claim_of_one_with_its_number_alone(objects: Objects) -> None:
    """Whoever took the run over has let it go, and another began it: numbers begin again."""
    with driving(objects) as claim:
        other = held_elsewhere(objects, 1)
        claim.renew()
        with pytest.raises(ClaimLostError, match=r"was taken over by process 4711 on far-away"):
            claim.check()
        assert json.loads(objects.get("claims/000001.json"))["token"] == other.token
    assert json.loads(objects.get("claims/000001.json"))["token"] == other.token, "nor is it let go with one's own"


def test_the_heart_beats(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.2)
    with driving(objects):
        [first] = objects.changes("claims").values()
        time.sleep(2)
        [later] = objects.changes("claims").values()
    assert later > first


def test_a_job_of_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_7"}}')
    assert ", job raysubmit_7, since" in str(Holder.this_process())
