"""Ray at the edge: finding or starting a cluster, and a pool of workers that does the keys of any stage.

Ray wraps plain classes here and nowhere else. A unit of work goes to a worker as a key and comes back as a receipt;
results travel through the run's storage, never through Ray's object store.

The pool: actors report ready before they are given work (importing torch takes seconds, and a lease must not run out
meanwhile); each has a bounded number of keys in flight; a key whose worker died, or whose lease ran out, goes to
another; a key whose own work fails is tried again unless the failure is one that repeats (`ValueError`, storage), and
then the stage goes on and reports it at the end. Ray's own task retries are off: with them, calls queue on an actor
that cannot be placed and never return.
"""

import logging
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, no_type_check

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_tracin.phantom import Edition, patient_grades, write_patient, write_tables
from ray_tracin.stages import Event, Listener, Stage, StageError, StageWorker

OBJECT_STORE_BYTES = 128 << 20
IN_FLIGHT_PER_WORKER = 2
TRIES = 3
POLL_SECONDS = 0.5
SLOWER_THAN_MEDIAN = 20
SHOWN_FAILURES = 5


@contextmanager
def cluster(address: str | None = None, cpus: int | None = None) -> Iterator[str]:
    """A connection to Ray: the cluster that ``address`` or RAY_ADDRESS names, else one embedded in this process.

    Yields ``"cluster"`` or ``"embedded"``, whose connection or processes end with the context, or ``"joined"`` where
    this process is connected already.

    Raises:
        ConnectionError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield "joined"
        return
    wanted = address or os.environ.get("RAY_ADDRESS")
    embedded = wanted in (None, "", "local")
    if embedded:
        # A private cluster needs no token, and must not leave one in the user's home.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(
            address="local" if embedded else wanted,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(_embedded_options(cpus) if embedded else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        if embedded:
            raise
        raise ConnectionError(f"no Ray cluster at {wanted!r}: {error}. Start one, or leave --address out") from error
    try:
        yield "embedded" if embedded else "cluster"
    finally:
        ray.shutdown()


def _embedded_options(cpus: int | None) -> dict[str, Any]:
    return {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}


class PoolWorker:
    """A process that does keys of one stage after another; wrapped into an actor where it is used."""

    def open(self, stage: Stage[Any]) -> int:
        """Get ready for a stage; the process id. Not done on creation: Ray would report an error without its cause."""
        self._worker = StageWorker(stage)
        return os.getpid()

    def do(self, key: Any) -> float:
        """Do a key; the seconds that it took."""
        return self._worker.do(key).seconds


class RayExecutor:
    """The executor that does keys in Ray: a pool of actors, or one task where keys depend on each other.

    Actors stay for the next stage that wants the same resources: starting one takes seconds.
    """

    def __init__(self) -> None:
        self._pool: Pool | None = None

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, stage: Stage[Any], keys: Sequence[Any], report: Callable[[Any], None]) -> None:
        """Do the keys.

        Raises:
            StageError: some keys failed; all others were done.
        """
        if stage.processes > 1:
            self.close()
            _execute_together(stage, keys, report)
            return
        if stage.sequential:
            self.close()
            _execute_in_order(stage, keys, report)
            return
        options = _resource_options(stage, float(stage.run.config.resources.threads))
        if self._pool is None or self._pool.options != options:
            self.close()
            self._pool = Pool(options)
        self._pool.execute(stage, keys, report)

    def close(self) -> None:
        """End the actors, so that what they hold is free for others."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _execute_in_order(stage: Stage[Any], keys: Sequence[Any], report: Callable[[Any], None]) -> None:
    """One Ray task that does the keys in order and hands each back as it is done; started anew where it stopped."""
    resources = stage.run.config.resources
    cpus = min(float(resources.training_threads), ray.cluster_resources().get("CPU", 1.0))
    options = _resource_options(stage, cpus)
    left, losses = deque(keys), 0
    while left:
        remote = ray.remote(num_returns="streaming", max_retries=0, **options)(_in_order)
        try:
            references: Any = remote.remote(stage, list(left))
            for reference in references:
                ray.get(reference)
                report(left.popleft())
                losses = 0
        except RayTaskError as error:
            raise stage_error(stage, {left[0]: cause_of(error)}, len(left)) from error
        except RayError as error:
            losses += 1
            if losses == TRIES:
                raise stage_error(stage, {left[0]: error}, len(left)) from error


def _execute_together(stage: Stage[Any], keys: Sequence[Any], report: Callable[[Any], None]) -> None:
    """Several processes that do each key together, through Ray Train, which takes seconds to import."""
    options = _resource_options(stage, float(stage.run.config.resources.training_threads))
    # Ray Train wants a CPU for each process, and whole GPUs.
    wanted = {"CPU": options["num_cpus"] or 1.0, **({"GPU": 1.0} if "num_gpus" in options else {})}
    try:
        import_module("ray_tracin.distributed").execute_with_ray_train(stage, keys, report, wanted)
    except Exception as error:
        raise stage_error(stage, {"training together": error}, len(keys)) from error


@no_type_check  # Ray asks whether this is a generator function, which a checking wrapper would hide.
def _in_order(stage: Stage[Any], keys: Sequence[Any]) -> Iterator[str]:
    worker = StageWorker(stage)
    for key in keys:
        worker.do(key)
        yield str(key)


def _resource_options(stage: Stage[Any], cpus: float) -> dict[str, Any]:
    """What one worker of the stage holds: a share of a GPU where there are GPUs and the stage uses them, else CPUs."""
    resources = stage.run.config.resources
    gpus = ray.cluster_resources().get("GPU", 0)
    # On a cluster that grows on demand there may be no GPU until one is asked for.
    wanted = resources.device == "cuda" or (resources.device == "auto" and gpus)
    if stage.uses_gpu and wanted:
        # A GPU worker must not hold a CPU for life: plain tasks beside it would starve on a small node.
        return {"num_gpus": resources.gpus_per_worker, "num_cpus": 0}
    return {"num_cpus": cpus}


@dataclass
class _Flight:
    key: Any
    worker: int
    started: float


class Pool:
    """Actors of one size that do the keys of a stage at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._actors: list[Any] = []

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def execute(self, stage: Stage[Any], keys: Sequence[Any], report: Callable[[Any], None]) -> None:
        """Do every key of the stage.

        Raises:
            StageError: some keys failed; all others were done.
        """
        self._begin(stage, len(keys))
        waiting, unfinished, tries = deque(keys), set(keys), Counter[Any]()
        failures: dict[Any, BaseException] = {}
        while unfinished - failures.keys():
            self._dispatch(waiting)
            for key, error in self._collect():
                if key not in unfinished:
                    continue  # A key that was given out twice: the second worker wrote the same bytes.
                if error is None:
                    unfinished.discard(key)
                    failures.pop(key, None)
                    report(key)
                elif isinstance(error, RayActorError):
                    waiting.append(key)
                else:
                    tries[key] += 1
                    if _repeats(error) or tries[key] == TRIES:
                        failures[key] = error
                    else:
                        waiting.append(key)
            waiting.extend(key for key in self._overdue() if key in unfinished)
        self._end()
        if failures:
            raise stage_error(stage, failures, len(keys))

    def _begin(self, stage: Stage[Any], keys: int) -> None:
        worker = ray.remote(max_restarts=-1, max_task_retries=0, **self.options)(PoolWorker)
        count = min(stage.run.config.resources.workers or _room_for(self.options), keys)
        self._actors += [worker.remote() for _ in range(count - len(self._actors))]
        self._stage = stage
        self._free: Counter[int] = Counter()
        self._booting = {actor.open.remote(stage): index for index, actor in enumerate(self._actors[:count])}
        self._flights: dict[Any, _Flight] = {}
        self._seconds: list[float] = []
        self._boot_failures = 0
        self._hung: set[int] = set()

    def _end(self) -> None:
        """A worker that still hangs in a key would hold up the next stage."""
        for index in sorted(self._hung, reverse=True):
            ray.kill(self._actors.pop(index))

    def _dispatch(self, waiting: deque[Any]) -> None:
        # Round robin, so that the last keys spread over the workers.
        for depth in range(IN_FLIGHT_PER_WORKER, 0, -1):
            for index in [index for index, room in self._free.items() if room >= depth]:
                if not waiting:
                    return
                key = waiting.popleft()
                self._free[index] -= 1
                self._flights[self._actors[index].do.remote(key)] = _Flight(key, index, time.monotonic())

    def _collect(self) -> list[tuple[Any, BaseException | None]]:
        references = [*self._flights, *self._booting]
        ready, _ = ray.wait(references, num_returns=1, timeout=POLL_SECONDS)
        return [result for reference in ready if (result := self._landed(reference)) is not None]

    def _landed(self, reference: Any) -> tuple[Any, BaseException | None] | None:
        if reference in self._booting:
            self._booted(reference)
            return None
        flight = self._flights.pop(reference)
        try:
            self._seconds.append(ray.get(reference))
        except RayActorError as error:
            self._reboot(flight.worker)
            return flight.key, error
        except RayTaskError as error:
            self._free[flight.worker] += 1
            return flight.key, cause_of(error)
        self._free[flight.worker] += 1
        return flight.key, None

    def _booted(self, reference: Any) -> None:
        index = self._booting.pop(reference)
        try:
            ray.get(reference)
        except RayTaskError as error:
            raise stage_error(self._stage, {"opening a worker": cause_of(error)}, 1) from error
        except RayActorError as error:
            self._boot_failures += 1
            if self._boot_failures >= TRIES * len(self._actors):
                raise stage_error(self._stage, {"starting a worker": error}, 1) from error
            self._reboot(index)
        else:
            self._free[index] = IN_FLIGHT_PER_WORKER

    def _reboot(self, index: int) -> None:
        """The worker's process is gone; Ray starts another, which gets work once it is ready."""
        self._free[index] = 0
        if index not in self._booting.values():
            self._booting[self._actors[index].open.remote(self._stage)] = index

    def _overdue(self) -> list[Any]:
        """Keys whose lease ran out, to be given to another worker; the first may still finish, and both agree."""
        lease = self._stage.run.config.resources.lease_seconds
        if self._seconds:
            lease = max(lease, SLOWER_THAN_MEDIAN * statistics.median(self._seconds))
        late = [ref for ref, flight in self._flights.items() if time.monotonic() - flight.started > lease]
        flights = [self._flights.pop(reference) for reference in late]
        self._hung |= {flight.worker for flight in flights}
        return [flight.key for flight in flights]


def _room_for(options: dict[str, Any]) -> int:
    resources = ray.cluster_resources()
    if options.get("num_gpus"):
        return max(1, int(resources.get("GPU", 0) / options["num_gpus"]))
    return max(1, int(resources.get("CPU", 1) / options["num_cpus"]))


def write_phantoms(
    folder: Path, patients: int, listen: Listener, *, edition: Edition = "2019", seed: int = 0, spacing: float = 2.0
) -> None:
    """Write synthetic patients, one a Ray task; files that are there are replaced by the same bytes.

    Raises:
        StorageError: the folder can't be written.
    """
    grades = patient_grades(patients)
    write: Any = ray.remote(num_cpus=1)(write_patient)
    pending = [
        write.remote(folder, number, edition=edition, seed=seed, spacing=spacing, grade=grade)
        for number, grade in enumerate(grades)
    ]
    listen(Event("phantoms", "begin", 0, patients))
    while pending:
        ready, pending = ray.wait(pending, num_returns=1)
        try:
            ray.get(ready)
        except RayTaskError as error:
            raise cause_of(error) from error
        listen(Event("phantoms", "done", patients - len(pending), patients))
    write_tables(folder, grades, edition=edition)
    listen(Event("phantoms", "end", patients, patients, detail=str(folder)))


def cause_of(error: RayTaskError) -> BaseException:
    """What the work itself raised."""
    return error.cause if isinstance(error.cause, BaseException) else error


def _repeats(error: BaseException) -> bool:
    """Whether doing the key again would fail again: what the user must mend, or storage that is full."""
    return isinstance(error, ValueError | OSError)


def stage_error(stage: Stage[Any], failures: dict[Any, BaseException], keys: int) -> StageError:
    """What a stage reports at its end about the keys that failed."""
    lines = [f"{key}: {_reason(error)}" for key, error in list(failures.items())[:SHOWN_FAILURES]]
    more = f"\n  … and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
    return StageError(
        f"stage {stage.name}: {len(failures)} of {keys} keys failed, the others are done and kept:\n  "
        + "\n  ".join(lines)
        + more
    )


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text.splitlines()[-1]}"
