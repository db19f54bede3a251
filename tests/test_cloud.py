"""A run on S3: the same bits as on disk, whatever the network does, and few listings."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import environment, pointed_at, s3_server
from conftest import TINY
from flaky import FAULTS, Faults, faulty

from ray_tracin.integrity import verify
from ray_tracin.objects import Objects, StorageError
from ray_tracin.pipeline import STEPS, Executors, run_to
from ray_tracin.report import PAGE
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.stages import execute_serially, sound_receipts
from ray_tracin.store import Receipt, RunStore

SERIAL = Executors(execute_serially, execute_serially)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(server: str) -> Iterator[str]:
    """The server's URL, known to this process by its environment."""
    with pointed_at(server):
        yield server


def contents(uri: str) -> dict[str, bytes]:
    """Every array, table, checkpoint and figure; what holds times or says where the run is, is left out."""
    objects = Objects(uri)
    kept = [path for path in objects.sizes() if path.split("/")[0] not in {"receipts", "claims", "attempts", "checked"}]
    kept = [path for path in kept if path not in {"config.yaml", "versions.json", "events.parquet", PAGE}]
    return dict(zip(kept, objects.parallel(objects.get, kept), strict=True))


def same_bits(uri: str, reference: Run, *, whole: bool = True) -> bool:
    got, expected = contents(uri), contents(reference.uri)
    assert got.keys() <= expected.keys()
    assert len(got) == len(expected) or not whole
    assert [path for path in got if got[path] != expected[path]] == []
    return len(got) > 100


@pytest.mark.slow
def test_a_run_on_s3_is_the_run_on_disk_and_lists_little(server: str, tiny_run: Run, patients: Path) -> None:
    asked = Faults()
    with faulty(server, asked) as proxy, pointed_at(proxy):
        run = start_run("s3://bucket/a run", preset="demo", overrides=[*TINY, f"data.root={patients}"])
        run_to(run, STEPS[-1], SERIAL, lambda event: None)
    with pointed_at(server):
        run = open_run(run.uri)
        assert same_bits(run.uri, tiny_run)
        assert verify(run) == {}
        keys = len(run.store.objects.sizes("receipts"))
    assert keys >= 90
    assert asked.requests["LIST"] < 2 * keys


@pytest.mark.chaos
def test_storage_that_fails_for_a_while_costs_time_only(
    server: str, tiny_run: Run, patients: Path, tmp_path: Path
) -> None:
    """The command itself, with its Ray workers: a tenth of all requests goes wrong, and once all do, for a while."""
    calm, faults = Faults(), Faults(share=0.1, seed=7)
    undisturbed = _run_against(server, calm, "s3://bucket/calm", patients, tmp_path)
    threading.Thread(target=_break_for_a_while, args=(faults, calm.requests.total() // 2), daemon=True).start()
    disturbed = _run_against(server, faults, "s3://bucket/faulty", patients, tmp_path)
    assert set(faults.injected) == set(FAULTS), "every kind of fault struck"
    assert faults.injected.total() > 50
    assert disturbed - OUTAGE_SECONDS <= 2 * undisturbed, (disturbed, undisturbed)
    # A request that went wrong is asked again, once or twice; nothing else is.
    assert faults.requests.total() <= 1.1 * calm.requests.total() + 2 * faults.injected.total()
    with pointed_at(server):
        for uri in ("s3://bucket/calm", "s3://bucket/faulty"):
            assert same_bits(uri, tiny_run)
            assert (open_run(uri).table("events").outcome == "done").all(), "no key was done twice"


OUTAGE_SECONDS = 8.0


def _break_for_a_while(faults: Faults, requests: int) -> None:
    """Once so much was asked, answer every request with an error for some seconds."""
    while faults.requests.total() < requests:
        time.sleep(0.05)
    faults.broken = True
    time.sleep(OUTAGE_SECONDS)
    faults.broken = False


def _run_against(server: str, faults: Faults, uri: str, patients: Path, folder: Path) -> float:
    """Seconds that the whole run takes."""
    settings = [argument for value in (*TINY, f"data.root={patients}") for argument in ("--set", value)]
    command = [sys.executable, "-m", "ray_tracin.cli", "run", "--run", uri, "--preset", "demo", *settings]
    began = time.monotonic()
    with faulty(server, faults) as proxy:
        done = subprocess.run(
            command, env={**os.environ, **environment(proxy, 60)}, cwd=folder, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert f": {uri}\n" in done.stdout
    return time.monotonic() - began


@pytest.mark.slow
def test_storage_that_stays_broken_ends_the_run_clearly_and_the_next_goes_on(
    server: str, tiny_run: Run, patients: Path
) -> None:
    uri, faults = "s3://bucket/broken", Faults(broken_after=250)
    with faulty(server, faults) as proxy, pointed_at(proxy, patience=1):
        run = start_run(uri, preset="demo", overrides=[*TINY, f"data.root={patients}"])
        message = (
            r"cannot (read|write|list|delete) s3://bucket/broken/.*503[\s\S]*"
            r"did not recover in time\. Run the same command again: what is done is kept"
        )
        with pytest.raises(StorageError, match=message):
            run_to(run, "influence", SERIAL, lambda event: None)
    assert faults.injected["503"] > 3
    with pointed_at(server):
        computed: list[str] = []
        begun = sum(1 for path in Objects(uri).sizes("receipts") if "/layout/" not in path)
        assert begun > 0
        run_to(open_run(uri), "influence", SERIAL, lambda event: computed.append(event.key))
        assert same_bits(uri, tiny_run, whole=False)
        receipts = sum(1 for path in Objects(uri).sizes("receipts") if "/layout/" not in path)
        assert sum(1 for key in computed if key) <= receipts - begun + 1


@pytest.mark.parametrize("kind", FAULTS)
def test_every_request_survives_every_fault(server: str, kind: str) -> None:
    faults = Faults(share=0.3, kinds=(kind,), seed=3)
    data = os.urandom(100_000)
    with faulty(server, faults) as proxy, pointed_at(proxy):
        objects = Objects(f"s3://bucket/{kind.replace(' ', '-')}")
        for number in range(5):
            assert objects.create(f"a/{number}", data[number:])
            assert not objects.create(f"a/{number}", b"another")
            assert objects.get(f"a/{number}") == data[number:]
            objects.put(f"a/{number}", data)
            assert objects.size(f"a/{number}") == len(data)
            assert len(objects.sizes("a")) == number + 1
        objects.delete([f"a/{number}" for number in range(5)])
        assert objects.sizes() == {}
    assert faults.injected[kind] > 3


def test_listings_do_not_grow_with_the_number_of_keys(server: str, tiny_run: Run) -> None:
    counts = []
    for keys in (20, 60):
        asked = Faults()
        with faulty(server, asked) as proxy, pointed_at(proxy):
            store = RunStore(f"s3://bucket/keys-{keys}")
            for key in range(keys):
                store.write_bytes(f"data.zarr/{key}", b"x")
                store.write_receipt(Receipt("s", str(key), tiny_run.fingerprint, files=store.take_written()))
            asked.requests.clear()
            assert len(sound_receipts(Run(store, tiny_run.config), "s")) == keys
        counts.append(asked.requests["LIST"])
    assert counts[0] == counts[1] <= 3


def test_patience_is_what_ends_a_request(server: str) -> None:
    with faulty(server, Faults(broken=True)) as proxy, pointed_at(proxy, patience=4):
        began = time.monotonic()
        with pytest.raises(StorageError, match="did not recover in time"):
            Objects("s3://bucket/never").put("a", b"x")
        assert 2 < time.monotonic() - began < 10


def test_what_is_wrong_with_a_url_is_said(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"cannot write s3://nobucket/run/a: .*nobucket.*Is there such a bucket\?"):
        Objects("s3://nobucket/run").put("a", b"x")
    with pytest.raises(StorageError, match=r"cannot open ftp://host/run: expected a folder, or a URL .* s3://, "):
        Objects("ftp://host/run").put("a", b"x")
    with pytest.raises(FileNotFoundError, match=r"no run at s3://bucket/nothing"):
        open_run("s3://bucket/nothing")
    monkeypatch.setenv("RAY_TRACIN_STORAGE_PATIENCE", "long")
    with pytest.raises(ValueError, match="RAY_TRACIN_STORAGE_PATIENCE is 'long': expected a number of seconds"):
        Objects("s3://bucket/run").put("a", b"x")


def test_google_storage_is_asked_as_its_environment_says(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Faults(broken=True)
    with faulty(server, asked) as proxy, pointed_at(server, patience=1):
        account = {"gcs_base_url": proxy, "disable_oauth": True, "client_email": "", "private_key": ""}
        (tmp_path / "account.json").write_text(json.dumps({**account, "private_key_id": ""}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
        with pytest.raises(StorageError, match=r"cannot write gs://bucket/run/a: .*/bucket/run%2Fa.*did not recover"):
            Objects("gs://bucket/run").put("a", b"x")
    assert asked.requests["PUT"] > 2
