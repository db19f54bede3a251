"""Ray Data at the edge: the executor of the stages that write tables.

Ray Data schedules the keys over the cluster; the rows go from the worker to the run's storage under names that their
keys determine, so that a second run replaces files instead of adding to them (Ray Data's own Parquet writer appends).
An error in one key would end a whole Ray Data job; it comes back as the key's answer instead, and the key is tried
again in the next job. So is a key that gives no answer because its process ended: by itself, Ray Data would try it for
ever. Every key is a block of its own, so that it is lost alone.
"""

import logging
import pickle
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray.data
from ray.exceptions import RayError

from ray_tracin.assignment import Assignment
from ray_tracin.faults import NoAnswerError, ended_after, reason, repeats, stage_error
from ray_tracin.stages import Attempt, Report, Stage, StageWorker


def do_key(row: dict[str, Any], stage: Stage[Any], keys: Sequence[Any]) -> dict[str, Any]:
    """Do the key at a position; what comes back says only which, and what was raised. A mapper of Ray Data."""
    position = int(row["item"])
    try:
        with ended_after(2 * stage.run.config.resources.lease_seconds):
            StageWorker(stage).do(keys[position])
    except Exception as error:
        return {"item": position, "error": _pickled(error)}
    return {"item": position, "error": b""}


def _pickled(error: Exception) -> bytes:
    try:
        travels = pickle.dumps(error)
        pickle.loads(travels)
    except Exception:  # Errors may hold what can't travel, or not be made of their text alone; their text can travel.
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return travels


def execute_on_ray_data(stage: Stage[Any], keys: Sequence[Any], report: Report) -> None:
    """The executor that does keys as Ray Data jobs: one, and more for keys that failed in a way that may pass.

    Raises:
        StageError: some keys failed; all others were done.
    """
    _configure()
    assigned = Assignment(keys)
    while not assigned.over:
        waiting = []
        while (key := assigned.take(0, ())) is not None:
            waiting.append(key)
        try:
            _run_job(stage, waiting, assigned, report)
        except RayError as error:
            raise stage_error(stage, {"writing a table": error}, len(keys), undone=assigned.left) from error
    if assigned.failures:
        raise stage_error(stage, assigned.failures, len(keys))


def _run_job(stage: Stage[Any], keys: Sequence[Any], assigned: Assignment, report: Report) -> None:
    began, silent = time.time(), dict.fromkeys(keys)
    for row in _dataset(stage, keys).iter_rows():
        key = keys[int(row["item"])]
        del silent[key]
        if not row["error"]:
            assigned.finish(key)
            report(key)
            continue
        error = pickle.loads(row["error"])
        report(key, Attempt("error", reason(error), started=time.time()))
        assigned.fail(key, error, for_good=repeats(error))
    for key in silent:
        report(key, Attempt("lost", reason(NoAnswerError()), started=began, seconds=time.time() - began))
        assigned.fail(key, NoAnswerError())


def _dataset(stage: Stage[Any], keys: Sequence[Any]) -> ray.data.Dataset:
    """The answers to the keys, as they come; a key whose process ended has none."""
    positions = ray.data.from_items(list(range(len(keys))), override_num_blocks=len(keys))
    mapper: Any = partial(do_key, stage=stage, keys=list(keys))
    workers = stage.run.config.resources.workers
    # No more than there are keys: Ray Data would warn of the difference.
    at_once = workers and min(workers, len(keys))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That there will be another way to say how often Ray is to try.
        return positions.map(mapper, num_cpus=1, concurrency=at_once, max_retries=0)


def _configure() -> None:
    """Keys that are lost don't end the job; progress is told by the run itself."""
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray._private", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
