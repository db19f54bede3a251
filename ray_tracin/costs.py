"""What every key cost: ``events.parquet``, and what it says of a stage.

A row is an attempt at a key: when, on what, how much memory, and how it ended. Receipts say it of the attempts that
did their keys; those that came to nothing are files of `stages.ATTEMPTS` until they stand in the table. Nothing that
the results depend on is here, and times differ from run to run.

Not known: what was in flight when the run's own process was killed.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ray_tracin.runs import Run
from ray_tracin.soundness import file_problems
from ray_tracin.stages import ATTEMPTS
from ray_tracin.store import EVENTS, IncompleteRunError, Receipt

COLUMNS = {
    "stage": "str",
    "key": "str",
    "attempt": "int32",
    "outcome": "str",
    "started": "datetime64[ms, UTC]",
    "ended": "datetime64[ms, UTC]",
    "seconds": "float64",
    "host": "str",
    "process": "int64",
    "device": "str",
    "peak_memory": "int64",
    "error": "str",
}
"""Of ``events.parquet``. ``outcome``: done, or why not (error, lost, hung, copy), or replaced: it was done, and has
been done anew since. ``process`` is 0 and the rest empty where it isn't known."""
SAME = ["stage", "key", "started"]
"""What tells attempts apart."""
EVENTS_KEY = "events"
"""The pseudo-stage, and its only key, of the receipt that vouches for the bytes of the table."""


def collect_events(run: Run, stages: Iterable[str]) -> pd.DataFrame:
    """Every attempt at every key of the stages, as ``events.parquet`` has them; oldest first within a key."""
    return events_of(run, [receipt for name in stages for receipt in run.store.receipts(name).values()])


def events_of(run: Run, receipts: Iterable[Receipt]) -> pd.DataFrame:
    """As `collect_events`, by receipts that were read before."""
    done = [_row_of(receipt) for receipt in receipts]
    failed = [_attempt_row(values) for values in _open_attempts(run).values()]
    fresh = _table(done + failed)
    known = _published(run)
    earlier = known.merge(fresh[SAME], how="left", on=SAME, indicator=True)
    earlier = earlier[earlier["_merge"] == "left_only"].drop(columns="_merge")
    earlier["outcome"] = earlier["outcome"].where(earlier["outcome"] != "done", "replaced")
    table = pd.concat([earlier, fresh], ignore_index=True).drop_duplicates(SAME)
    table = table.sort_values(["stage", *SAME[1:]], ignore_index=True)
    table["attempt"] = table.groupby(["stage", "key"]).cumcount() + 1
    return table.astype(COLUMNS)


def publish_events(run: Run, stages: Iterable[str]) -> None:
    """Bring ``events.parquet`` up to date; nothing is written where nothing happened."""
    store = run.store
    receipt = store.read_receipt(EVENTS_KEY, EVENTS_KEY)
    sound = receipt is not None and not file_problems(store, [receipt], check_bytes=True)
    attempts = _open_attempts(run)
    table = collect_events(run, stages)
    if table.empty or (sound and not attempts and table.equals(_published(run))):
        return
    store.take_written()
    store.write_table(EVENTS, table)
    store.write_receipt(Receipt(EVENTS_KEY, EVENTS_KEY, run.fingerprint, files=store.take_written()))
    # Only now: a kill in between leaves them twice, which the next call sees.
    store.objects.delete(attempts)


def _row_of(receipt: Receipt) -> dict[str, Any]:
    values = {name: getattr(receipt, name) for name in ("stage", "key", "started", "seconds", "peak_memory", "worker")}
    return _row(outcome="done", error="", **values)


def _attempt_row(values: dict[str, Any]) -> dict[str, Any]:
    return _row(peak_memory=0, **values)


def _row(*, worker: str, started: float, seconds: float, **values: Any) -> dict[str, Any]:
    host, process, device = (*worker.split(":", 2), "", "", "")[:3]
    moment = round(1000 * started)
    return {
        **values,
        "attempt": 0,
        "started": pd.Timestamp(moment, unit="ms", tz="UTC"),
        "ended": pd.Timestamp(moment + round(1000 * seconds), unit="ms", tz="UTC"),
        "seconds": seconds,
        "host": host,
        "process": int(process or 0),
        "device": device,
    }


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _open_attempts(run: Run) -> dict[str, dict[str, Any]]:
    paths = sorted(run.store.objects.sizes(ATTEMPTS))
    found = run.store.objects.parallel(lambda path: _readable(run, path), paths)
    return {path: values for path, values in zip(paths, found, strict=True) if values is not None}


def _readable(run: Run, path: str) -> dict[str, Any] | None:
    try:
        values = json.loads(run.store.objects.get(path))
        _attempt_row(values)
    except (ValueError, TypeError, FileNotFoundError):
        return None
    return dict(values)


def _published(run: Run) -> pd.DataFrame:
    try:
        return run.table(EVENTS_KEY).astype(COLUMNS)
    except (IncompleteRunError, ValueError, OSError, KeyError):
        return _table([])  # Never written, or damaged: what receipts say is enough to go on with.


@dataclass(frozen=True)
class StageCost:
    """What the attempts at the keys of a stage add up to."""

    worker_seconds: float = 0.0
    """Of all attempts, those in vain included."""
    retries: int = 0
    """Attempts beyond the one that did the key."""
    keys_a_minute: float = 0.0
    """While any worker was at it: pauses between commands don't count."""
    peak_memory: int = 0
    """Highest resident size of a worker, bytes."""


def stage_costs(events: pd.DataFrame) -> dict[str, StageCost]:
    """The costs of every stage that has events."""
    return {str(name): _cost(rows) for name, rows in events.groupby("stage")}


def _cost(rows: pd.DataFrame) -> StageCost:
    done = rows[rows["outcome"] == "done"]
    busy = _covered_seconds(done)
    return StageCost(
        worker_seconds=float(rows["seconds"].sum()),
        retries=len(rows) - len(done),
        keys_a_minute=60 * len(done) / busy if busy else 0.0,
        peak_memory=int(rows["peak_memory"].max()),
    )


def _covered_seconds(rows: pd.DataFrame) -> float:
    """Length of the union of the attempts' times."""
    times = np.sort(rows[["started", "ended"]].astype("int64").to_numpy(), axis=0)
    # Sorted begins and sorted ends: between an end and the next begin lies a pause if all that began have ended.
    pauses = np.maximum(times[1:, 0] - times[:-1, 1], 0)
    return float(times[-1, 1] - times[0, 0] - pauses.sum()) / 1000 if len(times) else 0.0
