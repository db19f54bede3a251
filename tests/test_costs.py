"""What keys cost: from receipts and failed attempts to a table that outlives both, and to what a stage adds up to."""

import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from faulty import Square
from rich.console import Console

from ray_tracin.costs import collect_events, publish_events, stage_costs
from ray_tracin.integrity import verify
from ray_tracin.objects import Objects
from ray_tracin.pipeline import stage_names, status
from ray_tracin.progress import PlainLines, progress
from ray_tracin.runs import Run, open_run, start_run
from ray_tracin.stages import (
    ATTEMPTS,
    Attempt,
    Event,
    complete,
    done_receipts,
    execute_serially,
    log_attempt,
    peak_memory,
)
from ray_tracin.store import Receipt


@pytest.fixture
def stage(tmp_path: Path) -> Square:
    (tmp_path / "attempts").mkdir()
    return Square(start_run(tmp_path / "run", preset="demo"), tmp_path / "attempts")


def test_the_table_keeps_what_receipts_and_attempts_say(stage: Square) -> None:
    complete(stage, execute_serially, lambda event: None)
    first = stage.keys()[0]
    log_attempt(stage, first, Attempt("lost", "its worker went away", "host:7:cpu", started=1000.0, seconds=2.5))
    publish_events(stage.run, [stage.name])
    assert stage.run.store.objects.sizes(ATTEMPTS) == {}, "they stand in the table now"
    table = stage.run.table("events")
    assert len(table) == 7
    lost = table[table.outcome == "lost"].iloc[0]
    assert (lost.key, lost.attempt, lost.host, lost.process, lost.device) == (str(first), 1, "host", 7, "cpu")
    assert lost.started == pd.Timestamp(1000, unit="s", tz="UTC")
    assert lost.ended - lost.started == pd.Timedelta(2.5, "s")
    done = table[(table.outcome == "done") & (table.key == str(first))].iloc[0]
    assert (done.attempt, done.error) == (2, "")
    assert done.peak_memory == done_receipts(stage)[str(first)].peak_memory


def test_publishing_again_changes_nothing_and_work_done_anew_is_still_counted(stage: Square) -> None:
    complete(stage, execute_serially, lambda event: None)
    publish_events(stage.run, [stage.name])
    file = Path(stage.run.uri) / "events.parquet"
    before = file.stat().st_mtime_ns
    publish_events(stage.run, [stage.name])
    assert file.stat().st_mtime_ns == before
    chunk = Path(stage.run.uri) / "squares.zarr/x/c/3"
    chunk.unlink()
    complete(stage, execute_serially, lambda event: None)
    publish_events(stage.run, [stage.name])
    table = stage.run.table("events").set_index("key")
    assert list(table.loc["000006-000008", "outcome"]) == ["replaced", "done"]
    assert len(table) == 7
    assert stage_costs(collect_events(stage.run, [stage.name]))[stage.name].retries == 1


def test_a_damaged_table_is_found_and_written_anew(tiny_run: Run, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(tiny_run.uri, tmp_path / "run"))
    file = Path(run.uri) / "events.parquet"
    file.unlink()  # What other tests did to the run stands in the table alone.
    publish_events(run, stage_names(run))
    whole = file.read_bytes()
    before = run.table("events")
    for damage in (whole[:-7], bytes([whole[0] ^ 1]) + whole[1:], b""):
        file.write_bytes(damage)
        found = verify(open_run(run.uri))
        assert list(found) == ["events/events"], found
        publish_events(run, stage_names(run))
        assert verify(open_run(run.uri)) == {}
        pd.testing.assert_frame_equal(run.table("events"), before)


def test_rates_leave_pauses_out(stage: Square) -> None:
    complete(stage, execute_serially, lambda event: None)
    receipts = list(done_receipts(stage).values())
    # Two workers for ten seconds, a pause of an hour, one worker for ten seconds: five keys in twenty seconds.
    times = [(0, 10), (0, 5), (5, 5), (3610, 5), (3615, 5)]
    for receipt, (started, seconds) in zip(receipts, times, strict=False):
        stage.run.store.write_receipt(replace(receipt, started=5000.0 + started, seconds=float(seconds)))
    stage.run.store.objects.delete([receipts[5].path])
    cost = stage_costs(collect_events(stage.run, [stage.name]))[stage.name]
    assert (cost.keys_a_minute, cost.worker_seconds, cost.retries) == (15.0, 30.0, 0)


def test_status_says_how_long_is_left(tiny_run: Run) -> None:
    lines = {line.stage: line for line in status(tiny_run)}
    assert lines["tiles"].seconds_left == 0
    halfway = replace(lines["tiles"], done=9, cost=replace(lines["tiles"].cost, keys_a_minute=3.0))
    assert halfway.seconds_left == 180
    assert replace(halfway, total=None).seconds_left is None


def test_peak_memory_is_in_bytes_where_the_system_counts_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    on_a_mac = peak_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory() >= 1024 * on_a_mac > 0


def test_status_counts_what_was_done_for_this_configuration(tmp_path: Path) -> None:
    """Cases may have been inspected before a setting was mended, also those of another folder."""
    run = start_run(tmp_path / "run", preset="demo")
    run.store.write_receipt(Receipt("inspect", "CASE", "another", started=5.0, seconds=1.0))
    inspected = status(run)[0]
    assert (inspected.stage, inspected.done, inspected.cost.worker_seconds) == ("inspect", 0, 1.0)


def test_status_reads_every_receipt_once(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read, get = open_run(tiny_run.uri), Counter[str](), Objects.get

    def counted(objects: Objects, path: str) -> bytes:
        read[path] += 1
        return get(objects, path)

    monkeypatch.setattr(Objects, "get", counted)
    status(run)
    assert {read[receipt.path] for name in ("cut", "tiles") for receipt in run.store.receipts(name).values()} == {2}


def test_the_log_of_a_job_has_plain_lines_and_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=100, force_terminal=False)
    with progress(console) as listen:
        assert isinstance(listen, PlainLines)
        for number in range(3):
            listen(Event("tiles", "begin" if number == 0 else "done", number, 4, key=f"k{number}"))
        listen(Event("tiles", "again", 2, 4, key="k7", detail="lost: its worker went away"))
        listen(Event("tiles", "end", 4, 4, detail="4 computed"))
        listen(Event("export", "begin", 2, 2))
        listen(Event("export", "end", 2, 2, detail="0 computed"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiles: an attempt at k7 came to nothing, lost: its worker went away"
    assert lines[1].startswith("tiles: 4/4 in ")
    assert lines[1].endswith("s, 1 in vain 4 computed")
    assert [line.split()[:2] for line in lines[-2:]] == [["tiles", "2"], ["in", "all"]]
    assert not any(line.startswith("export ") for line in lines[3:]), "nothing was computed there"


def test_the_rate_of_a_stage_in_several_parts_is_that_of_the_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that are freed come checkpoint by checkpoint: the hour before tells nothing of this one."""
    clock = Mock()
    monkeypatch.setattr("ray_tracin.progress.time", clock)
    lines = PlainLines(Console(width=100, force_terminal=False))
    events = [(0, "begin", 0), (3600, "end", 10), (4000, "begin", 10)]
    for moment, kind, done in [*events, (4006, "done", 11)]:
        clock.monotonic.return_value = float(moment)
        lines(Event("gradients", kind, done, 20))
    assert capsys.readouterr().out.splitlines() == [
        "gradients: 10/20 in 3600.0 s",
        "gradients: 11/20 in 3606.0 s, 10.0 keys a minute, about 54 s left",
    ]


def test_a_stage_of_which_nothing_is_heard_is_told_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch of a training can take minutes."""
    clock = Mock()
    monkeypatch.setattr("ray_tracin.progress.time", clock)
    lines = PlainLines(Console(width=100, force_terminal=False))
    clock.monotonic.return_value = 0.0
    lines(Event("train", "begin", 0, 30))
    for moment in (10, 29, 30, 40, 59, 60):
        clock.monotonic.return_value = float(moment)
        lines.remind()
    lines(Event("train", "end", 30, 30))
    told = capsys.readouterr().out.splitlines()
    assert told[:-1] == ["train: 0/30 in 30 s, at work", "train: 0/30 in 60 s, at work"]
    clock.monotonic.return_value = 1000.0
    lines.remind()
    assert capsys.readouterr().out == ""


def test_the_log_is_reminded_by_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PLAIN_LINE_SECONDS", "SILENT_SECONDS"):
        monkeypatch.setattr(f"ray_tracin.progress.{name}", 0.01)
    with progress(Console(width=100, force_terminal=False)) as listen:
        listen(Event("train", "begin", 0, 30))
        time.sleep(0.5)
    assert "train: 0/30 in 0 s, at work" in capsys.readouterr().out


def test_attempts_are_files_of_their_own_until_they_stand_in_the_table(stage: Square) -> None:
    attempt = Attempt("error", "RuntimeError: x", "h:1:cpu", started=5.0, seconds=1.0)
    for key in stage.keys()[:2]:
        log_attempt(stage, key, attempt)
    files = stage.run.store.objects.sizes(ATTEMPTS)
    assert len(files) == 2
    values = json.loads(stage.run.store.objects.get(next(iter(files))))
    assert Attempt(**{name: values[name] for name in Attempt.__dataclass_fields__}) == attempt
    (Path(stage.run.uri) / next(iter(files))).write_text("{ cut sh")
    assert len(collect_events(stage.run, [stage.name])) == 1, "one that is damaged is left out"
