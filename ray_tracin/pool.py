"""A pool of Ray actors that does the keys of a stage, whatever happens to actors, nodes and keys.

A worker reports ready before it is given work (importing torch takes seconds, and a lease must not run out meanwhile),
has a bounded number of keys in flight, and is never restarted by Ray: with Ray's own retries, calls queue on an actor
that cannot be placed and never return. The pool hires a new worker instead, where and while the cluster has room.

A key whose worker went away, or whose lease ran out, goes to another worker; so does one that takes far longer than
the others when workers have nothing else to do. Workers that wait for room are what an autoscaler sees as demand;
those that are idle or not needed any more are let go. A node whose workers keep dying gets no more of them.
"""

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ray_tracin.assignment import TRIES, Assignment
from ray_tracin.capacity import WAITING_SECONDS, room_for, say_it_waits
from ray_tracin.faults import (
    cause_of,
    device_failed,
    node_died,
    process_died,
    ran_out_of_memory,
    reason,
    repeats,
    stage_error,
    verdict,
)
from ray_tracin.stages import Attempt, Outcome, Report, Stage
from ray_tracin.workers import SLOWER_THAN_MEDIAN, PoolWorker

SHORT_SECONDS = 1.0
"""Keys that take less than this are given out before the worker has finished the one before; others needn't be."""
REMEMBERED = 200
"""Keys whose times say what is usual."""
POLL_SECONDS = 0.5
RESIZE_SECONDS = 2.0
IDLE_SECONDS = 30.0
"""Idle workers of a cluster that grows and shrinks are let go after this long."""
COPIED_AFTER_MEDIANS = 3
COPIED_AFTER_SECONDS = 10.0
"""When workers are idle, keys that take longer than this, and than so many medians, are done twice."""
OPENING_SECONDS = 120.0
"""A worker that takes longer to get ready for a stage, and longer than two leases, is replaced."""
NODE_LABEL = "ray.io/node-id"
UNKNOWN = "unknown"

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Flight:
    key: Any
    worker: "_Worker"
    reference: Any
    started: float
    """When the worker came to it, on the clock of this process; `time.monotonic`."""
    overdue: bool = False


@dataclass(eq=False)
class _Worker:
    number: int
    actor: Any
    where: Any = None
    opening: Any = None
    ready: bool = False
    placed: float | None = None
    """When its process was first seen to be there."""
    name: str = ""
    flights: list[_Flight] = field(default_factory=list)
    """In the order in which they will be done; the first is being done."""
    errors: int = 0
    """Keys in a row on which the work raised."""
    idle_since: float = field(default_factory=time.monotonic)


class Pool:
    """Workers of one size that do the keys of a stage at a time. They stay for the next stage.

    ``elastic`` is for clusters that grow on demand: there, more workers are asked for than there is room for.
    """

    def __init__(self, options: dict[str, Any], *, elastic: bool = False) -> None:
        self.options = options
        self._elastic = elastic
        self._workers: list[_Worker] = []
        self._hired = 0
        self._deaths: Counter[str] = Counter()
        """Of workers, by node."""
        self._lightened = 0
        """How often the memory that a worker asks for was doubled, because one had died of too little."""

    def close(self) -> None:
        """End the workers, so that what they hold is free for others."""
        for worker in [*self._workers]:
            self._dismiss(worker)

    def execute(self, stage: Stage[Any], keys: Sequence[Any], report: Report) -> None:
        """Do every key of the stage.

        Raises:
            StageError: some keys failed; all others were done.
        """
        self._stage, self._report, self._keys = stage, report, Assignment(keys)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._total, self._failed_starts, self._failed_devices = len(keys), 0, 0
        self._refusing: set[str] = set()
        self._full = self._warned = False
        self._began = self._sized = time.monotonic()
        for worker in self._workers:
            worker.ready = False
        self._resize()
        while not self._keys.over:
            self._dispatch()
            self._collect()
            self._look_after()
        self._end()
        if self._keys.failures:
            raise stage_error(stage, self._keys.failures, len(keys))

    # Size

    def _resize(self) -> None:
        """Open, hire or let go workers, so that there are as many as the waiting keys and the room ask for."""
        self._sized = time.monotonic()
        busy = sum(bool(worker.flights) for worker in self._workers)
        wanted = max(1, min(self._target(), busy + self._keys.waiting))
        open_ones = [worker for worker in self._workers if worker.opening is not None]
        for worker in [worker for worker in self._workers if worker.opening is None][: max(0, wanted - len(open_ones))]:
            self._open(worker)
            open_ones.append(worker)
        for _ in range(0 if self._full and any(worker.ready for worker in open_ones) else wanted - len(open_ones)):
            self._hire()
        pending = [worker for worker in open_ones if not worker.ready and worker.placed is None]
        for worker in pending[: max(0, len(open_ones) - wanted)]:
            self._dismiss(worker)

    def _target(self) -> int:
        fixed = self._stage.run.config.resources.workers
        if fixed is not None:
            return fixed
        room = room_for(self._options(), avoid=self._sick())
        return room + max(1, room) if self._elastic else max(1, room)

    def _options(self) -> dict[str, Any]:
        """What the next worker holds: more memory, so that fewer share a node, after one ran out of it."""
        if "memory" not in self.options or not self._lightened:
            return dict(self.options)
        doubled = (
            {**self.options, "memory": self.options["memory"] * 2**times} for times in range(self._lightened, 0, -1)
        )
        return next((more for more in doubled if room_for(more)), dict(self.options))

    def _sick(self) -> set[str]:
        """Nodes whose workers keep dying, unless no other node has room."""
        found = {node for node, deaths in self._deaths.items() if deaths >= TRIES}
        return found if found and room_for(self.options, avoid=found) else set()

    def _hire(self) -> None:
        options, sick = self._options(), self._sick()
        if sick:
            options["label_selector"] = {NODE_LABEL: f"!in({','.join(sorted(sick))})"}
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0, **options)(PoolWorker).remote()
        self._hired += 1
        worker = _Worker(self._hired, actor, where=actor.where.remote())
        self._workers.append(worker)
        self._open(worker)

    def _open(self, worker: _Worker) -> None:
        worker.errors, worker.placed = 0, None
        worker.opening = worker.actor.open.remote(self._stage)

    def _dismiss(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        ray.kill(worker.actor)

    # Work

    def _dispatch(self) -> None:
        ready = [worker for worker in self._workers if worker.ready]
        numbers = [worker.number for worker in ready]
        # Round robin, so that the last keys spread over the workers.
        for depth in range(2 if self._seconds and self._usual() < SHORT_SECONDS else 1):
            for worker in ready:
                if len(worker.flights) == depth and not any(flight.overdue for flight in worker.flights):
                    self._give(worker, numbers)

    def _give(self, worker: _Worker, others: list[int]) -> None:
        key = self._keys.take(worker.number, others)
        if key is not None:
            flight = _Flight(key, worker, worker.actor.do.remote(key), time.monotonic())
            worker.flights.append(flight)

    def _collect(self) -> None:
        flights = {flight.reference: flight for worker in self._workers for flight in worker.flights}
        booting = {worker.opening: worker for worker in self._workers if worker.opening and not worker.ready}
        if not flights and not booting:
            self._resize()
            return
        found, _ = ray.wait([*flights, *booting], num_returns=1, timeout=POLL_SECONDS)
        for reference in found:
            if reference in booting:
                self._opened(booting[reference])
            else:
                self._landed(flights[reference])

    def _opened(self, worker: _Worker) -> None:
        try:
            worker.name = ray.get(worker.opening)
        except RayTaskError as error:
            self._start_failed(worker, cause_of(error), "opening a worker")
        except RayError as error:
            if node_died(error):
                self._lose(worker, error, "lost")  # Which says nothing of the next node.
            else:
                self._start_failed(worker, error, "starting a worker")
        else:
            worker.ready, worker.idle_since = True, time.monotonic()
            self._failed_starts = 0

    def _start_failed(self, worker: _Worker, error: BaseException, what: str) -> None:
        self._failed_starts += 1
        self._refusing.add(self._node_of(worker))
        # One node says nothing of the others.
        same = repeats(error) and (len(self._refusing) >= TRIES or not room_for(self.options, avoid=self._refusing))
        if same or self._failed_starts >= TRIES * max(1, len(self._workers)):
            if not any(other.ready for other in self._workers):
                raise stage_error(self._stage, {what: error}, self._total, undone=self._keys.left) from error
            self._full = True
        self._lightened += ran_out_of_memory(error)
        self._let_go(worker, blamed=True)

    def _landed(self, flight: _Flight) -> None:
        worker = flight.worker
        # A worker does its keys in order: what came before this one has landed too.
        while flight in worker.flights[1:]:
            self._landed(worker.flights[0])
        if flight not in worker.flights:
            return
        try:
            seconds = ray.get(flight.reference)
        except RayTaskError as error:
            self._next(worker)
            self._erred(flight, cause_of(error))
        except RayError as error:
            self._lose(worker, verdict(worker.actor, error), "lost")
        else:
            self._next(worker)
            worker.errors = 0
            self._seconds.append(seconds)
            self._count(flight)

    def _count(self, flight: _Flight) -> None:
        if self._keys.finish(flight.key):
            self._report(flight.key)
        else:
            self._log(flight, "copy", "another worker was first")

    def _next(self, worker: _Worker) -> None:
        """The worker goes on with the next key in its hands: from now on the time counts as that key's."""
        worker.flights.pop(0)
        worker.idle_since = time.monotonic()
        if worker.flights:
            worker.flights[0].started = worker.idle_since

    def _erred(self, flight: _Flight, error: BaseException) -> None:
        self._log(flight, "error", reason(error))
        self._keys.fail(flight.key, error, for_good=repeats(error))
        flight.worker.errors += not repeats(error)
        # Unless no process can do anything: then new ones cost more than they help.
        broken = device_failed(error) and (bool(self._seconds) or self._failed_devices < TRIES)
        self._failed_devices += broken
        if broken or (flight.worker.errors >= TRIES and self._seconds):
            # Others succeed: it may be the process or its GPU that fails, and another one may be on a better node.
            self._let_go(flight.worker, blamed=True)

    def _lose(self, worker: _Worker, error: BaseException, outcome: Outcome) -> None:
        """The worker is gone, or has to go: its keys wait again, and the one it was at is blamed if it was a death."""
        self._land_written(worker)
        self._lightened += ran_out_of_memory(error)
        blamed = process_died(error) or outcome == "hung"
        if worker.flights:
            self._log(worker.flights[0], outcome, reason(error))
        if worker.flights and blamed:
            # To the end of the queue: a sick node must not take all tries of one key.
            self._keys.fail(worker.flights[0].key, error)
        self._let_go(worker, blamed=blamed)

    def _land_written(self, worker: _Worker) -> None:
        """Count what the worker had finished: Ray loses the answer where the process dies soon after giving it.

        Without this, the key before the one that ends the worker would be blamed for it.
        """
        run = self._stage.run
        while worker.flights:
            try:
                receipt = run.store.read_receipt(self._stage.name, str(worker.flights[0].key))
            except OSError:
                return  # Doing a key again is dearer than asking, and always right.
            if (
                receipt is None
                or receipt.released
                or (receipt.worker, receipt.fingerprint) != (worker.name, run.fingerprint)
            ):
                return
            flight = worker.flights[0]
            self._next(worker)
            self._count(flight)

    def _let_go(self, worker: _Worker, *, blamed: bool) -> None:
        """End the worker, whose keys wait again; ``blamed``: it or its node is at fault."""
        self._dismiss(worker)
        if blamed:
            self._count_death(self._node_of(worker))
        flights, worker.flights = worker.flights, []
        for flight in reversed(flights):
            self._keys.give_back(flight.key)
        self._resize()

    def _count_death(self, node: str) -> None:
        self._deaths[node] += 1
        if self._deaths[node] == TRIES and node in self._sick():
            # Those that wait for room were hired for any node, and the one that died has just made room.
            for worker in [worker for worker in self._workers if not worker.ready]:
                if self._node_of(worker) in (node, UNKNOWN):
                    self._dismiss(worker)

    def _node_of(self, worker: _Worker) -> str:
        try:
            return str(ray.get(worker.where, timeout=0))
        except RayError:
            return UNKNOWN

    def _log(self, flight: _Flight, outcome: Outcome, error: str) -> None:
        seconds = time.monotonic() - flight.started
        self._report(flight.key, Attempt(outcome, error, flight.worker.name, time.time() - seconds, seconds))

    # Time

    def _look_after(self) -> None:
        moment = time.monotonic()
        lease = self._lease()
        for flight in [worker.flights[0] for worker in self._workers if worker.flights]:
            age = moment - flight.started
            if age > 2 * lease:
                message = f"did not finish within twice the lease of {lease:.0f} s (resources.lease_seconds)"
                self._lose(flight.worker, TimeoutError(message), "hung")
            elif age > lease and not flight.overdue:
                flight.overdue = True
                for late in flight.worker.flights:
                    self._keys.give_back(late.key)
        self._copy_slow_keys(moment)
        if moment - self._sized > RESIZE_SECONDS:
            self._resize()
            self._end_stuck_openings(moment)
            self._let_idle_go(moment)
            self._say_if_none_came(moment)

    def _lease(self) -> float:
        return max(float(self._stage.run.config.resources.lease_seconds), SLOWER_THAN_MEDIAN * self._usual())

    def _usual(self) -> float:
        """Seconds that a key of this stage takes, by the median of the last ones."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    def _copy_slow_keys(self, moment: float) -> None:
        """Give keys that take far longer than usual to idle workers too: their own may be on a slow node."""
        idle = [worker for worker in self._workers if worker.ready and not worker.flights]
        if not idle or self._keys.waiting or not self._seconds:
            return
        limit = max(COPIED_AFTER_SECONDS, COPIED_AFTER_MEDIANS * self._usual())
        flights = [flight for worker in self._workers for flight in worker.flights]
        slow = [flight for flight in flights if moment - flight.started > limit and self._keys.copies(flight.key) == 1]
        for flight in slow[: len(idle)]:
            self._keys.give_back(flight.key)

    def _end_stuck_openings(self, moment: float) -> None:
        for worker in [worker for worker in self._workers if worker.opening is not None and not worker.ready]:
            if worker.placed is None and ray.wait([worker.where], timeout=0)[0]:
                worker.placed = moment
            if worker.placed is not None and moment - worker.placed > max(OPENING_SECONDS, 2 * self._lease()):
                self._start_failed(worker, TimeoutError("did not open within twice the lease"), "opening a worker")

    def _let_idle_go(self, moment: float) -> None:
        if not self._elastic or self._keys.waiting:
            return
        idle = [worker for worker in self._workers if worker.ready and not worker.flights]
        # One stays, for a key whose worker goes away.
        for worker in idle[1:]:
            if moment - worker.idle_since > IDLE_SECONDS:
                self._dismiss(worker)

    def _say_if_none_came(self, moment: float) -> None:
        if not self._warned and moment - self._began > WAITING_SECONDS and not any(w.name for w in self._workers):
            self._warned = True
            say_it_waits(self._stage, self.options)

    def _end(self) -> None:
        """A worker that is still at a key, done elsewhere or given up, would hold up the next stage."""
        for worker in [worker for worker in self._workers if worker.flights]:
            given_up = self._keys.is_open(worker.flights[0].key)
            self._log(
                worker.flights[0], "copy", "the key has failed for good" if given_up else "another worker was first"
            )
            worker.flights = []
            self._dismiss(worker)
        for worker in [worker for worker in self._workers if worker.opening and not worker.ready]:
            self._dismiss(worker)
        for worker in self._workers:
            worker.opening, worker.ready = None, False
