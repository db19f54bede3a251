"""What runs in processes that Ray starts: a worker of the pool, or a task that does keys in order.

Apart from who asks for it: such a process imports this and its stage's own module, and neither plans nor draws.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, no_type_check

import ray

from ray_tracin.faults import ended_after
from ray_tracin.stages import Stage, StageWorker

SLOWER_THAN_MEDIAN = 20
"""A key may take so many times the median before it is taken for hung, and no less than the lease."""


class PoolWorker:
    """A process that does keys of one stage after another; wrapped into an actor where it is used."""

    def where(self) -> str:
        """The node that the process is on."""
        return str(ray.get_runtime_context().get_node_id())

    def open(self, stage: Stage[Any]) -> str:
        """Get ready for a stage; host, process and device. Not done on creation: Ray would hide the error's cause."""
        self._worker = StageWorker(stage)
        return self._worker.name

    def do(self, key: Any) -> float:
        """Do a key; the seconds that it took."""
        return self._worker.do(key).seconds


@no_type_check  # Ray asks whether this is a generator function, which a checking wrapper would hide.
def do_in_order(stage: Stage[Any], keys: Sequence[Any]) -> Iterator[str]:
    """Do keys that depend on the ones before them; each is handed back as it is done."""
    worker = StageWorker(stage)
    seconds = [receipt.seconds for receipt in stage.run.store.receipts(stage.name).values()]
    for key in keys:
        with ended_after(_longest(stage, seconds)):
            seconds.append(worker.do(key).seconds)
        yield str(key)


def _longest(stage: Stage[Any], seconds: Sequence[float]) -> float | None:
    """Seconds after which a key is taken for hung, by those that the keys before it took; None for the first.

    A key after which files were lost does what leads to it anew, which at the most is all keys.
    """
    if not seconds:
        return None
    many = max(SLOWER_THAN_MEDIAN, len(stage.keys()))
    return 2 * max(float(stage.run.config.resources.lease_seconds), many * statistics.median(seconds))
