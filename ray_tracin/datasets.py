"""Ray Data at the edge: the executor of the stages that write tables.

Ray Data schedules the keys over the cluster; the rows go from the worker to the run's storage under names that their
keys determine, so that a second run replaces files instead of adding to them (Ray Data's own Parquet writer appends).
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray.data
from ray.exceptions import RayError, RayTaskError

from ray_tracin.runtime import cause_of, stage_error
from ray_tracin.stages import Stage, StageWorker


def write_table(row: dict[str, Any], stage: Stage[Any], keys: Sequence[Any]) -> dict[str, Any]:
    """Do the key at a position; the row that comes back says only which. A mapper of Ray Data."""
    StageWorker(stage).do(keys[int(row["item"])])
    return row


def execute_on_ray_data(stage: Stage[Any], keys: Sequence[Any], report: Callable[[Any], None]) -> None:
    """The executor that does keys as a Ray Data job.

    Raises:
        StageError: a key failed; those that were done before are kept.
    """
    _be_quiet()
    positions = ray.data.from_items(list(range(len(keys))), override_num_blocks=len(keys))
    mapper: Any = partial(write_table, stage=stage, keys=list(keys))
    written = positions.map(mapper, num_cpus=1, concurrency=stage.run.config.resources.workers)
    try:
        for row in written.iter_rows():
            report(keys[int(row["item"])])
    except RayTaskError as error:
        raise stage_error(stage, {"writing a table": cause_of(error)}, len(keys)) from error
    except RayError as error:
        raise stage_error(stage, {"writing a table": error}, len(keys)) from error


def _be_quiet() -> None:
    """Progress is told by the run itself."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray._private", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
