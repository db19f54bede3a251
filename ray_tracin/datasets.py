"""Ray Data at the edge: the executor of the stages that write tables.

Ray Data schedules the keys over the cluster; the rows go from the worker to the run's storage under names that their
keys determine, so that a second run replaces files instead of adding to them (Ray Data's own Parquet writer appends).
"""

from collections.abc import Callable, Sequence
from typing import Any

import ray.data
from ray.exceptions import RayError, RayTaskError

from ray_tracin.runtime import cause_of, stage_error
from ray_tracin.stages import Stage, StageWorker


class TableWriter:
    """A stateful mapper of Ray Data: does the keys whose positions it is given."""

    def __init__(self, stage: Stage[Any], keys: Sequence[Any]) -> None:
        self._worker = StageWorker(stage)
        self._keys = keys

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do one key; the row that comes back says only which."""
        position = int(row["item"])
        self._worker.do(self._keys[position])
        return {"position": position}


def execute_on_ray_data(stage: Stage[Any], keys: Sequence[Any], report: Callable[[Any], None]) -> None:
    """The executor that does keys as a Ray Data job.

    Raises:
        StageError: a key failed; those that were done before are kept.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    workers = min(len(keys), stage.run.config.resources.workers or cpus)
    positions = ray.data.from_items(list(range(len(keys))), override_num_blocks=len(keys))
    writer: Any = TableWriter
    written = positions.map(
        writer,
        fn_constructor_args=(stage, list(keys)),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    try:
        for row in written.iter_rows():
            report(keys[int(row["position"])])
    except RayTaskError as error:
        raise stage_error(stage, {"writing a table": cause_of(error)}, len(keys)) from error
    except RayError as error:
        raise stage_error(stage, {"writing a table": error}, len(keys)) from error
