"""Ray at the edge: finding or starting a cluster, and who does the keys of which stage on it.

Ray wraps plain classes here and in the modules beside it: a unit of work goes to a worker as a key, and what comes back
says no more than that it is done; results travel through the run's storage, never through Ray's object store. What
happens to workers is `pool`'s affair, tables are `datasets`', processes that train together `distributed`'s.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayError, RayTaskError

from ray_tracin.assignment import TRIES
from ray_tracin.capacity import most_cpus, refuse_nodes_without_memory, resource_options, room_for, waiting_told
from ray_tracin.config import RunConfig
from ray_tracin.faults import cause_of, reason, repeats, stage_error
from ray_tracin.phantom import Edition, patient_grades, reserve, write_patient, write_tables
from ray_tracin.pipeline import is_prepared
from ray_tracin.planning import plan_of
from ray_tracin.pool import Pool
from ray_tracin.stages import Attempt, Event, Listener, Outcome, Report, Stage, done_receipts, require_one_storage
from ray_tracin.vocabulary import UsageError
from ray_tracin.workers import do_in_order

OBJECT_STORE_BYTES = 128 << 20
CONNECT_SECONDS = 10.0


@contextmanager
def cluster(address: str | None = None, cpus: int | None = None) -> Iterator[str]:
    """A connection to Ray: the cluster that ``address`` or RAY_ADDRESS names, else one embedded in this process.

    Yields ``"cluster"`` or ``"embedded"``, whose connection or processes end with the context, or ``"joined"`` where
    this process is connected already.

    Raises:
        ConnectionError: there is no cluster at the address.
        UsageError: the address is one of Ray Client, through which training has no streaming task.
    """
    if ray.is_initialized():
        yield "joined"
        return
    wanted = address or os.environ.get("RAY_ADDRESS")
    if str(wanted).startswith("ray://"):
        raise UsageError(
            f"{wanted} is an address of Ray Client, which can't do all that a run asks of Ray: submit the same as a "
            "job (`ray job submit -- ray-tracin …`), or give HOST:PORT on a machine of the cluster"
        )
    embedded = wanted in (None, "", "local")
    if embedded:
        # A private cluster needs no token, and must not leave one in the user's home.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    else:
        _refuse_silent_address(str(wanted))
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
        with _interrupted_when_terminated():
            yield "embedded" if embedded else "cluster"
    finally:
        ray.shutdown()


@contextmanager
def _interrupted_when_terminated() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does. Ray, once it runs, would print the stack of its own code and abort."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Where no signal arrives.
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _refuse_silent_address(address: str) -> None:
    """Nothing, if something listens at host:port. Ray itself would ask for many minutes, without a word."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster at {address!r}: {error}. Start one, or leave --address out") from None


def _embedded_options(cpus: int | None) -> dict[str, Any]:
    return {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}


class RayExecutor:
    """The executor that does keys in Ray: a pool of actors, or one task where keys depend on each other.

    Actors stay for the next stage that wants the same resources: starting one takes seconds. ``elastic``: the cluster
    grows and shrinks on demand, so that more workers are asked for than there is room for.
    """

    def __init__(self, *, elastic: bool = False) -> None:
        self._elastic = elastic
        self._pool: Pool | None = None
        self._planned: tuple[RunConfig, int] | None = None

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, stage: Stage[Any], keys: Sequence[Any], report: Report) -> None:
        """Do the keys.

        Raises:
            StageError: some keys failed; all others were done.
            ValueError: no node has the memory that the plan of the run says a worker will take, or will ever have what
                the stage asks for; or workers wrote where this process can't see it.
        """
        if stage.processes > 1:
            self.close()
            options = resource_options(stage, float(stage.run.config.resources.training_threads))
            if "num_gpus" in options:
                options = {"num_gpus": 1.0, "num_cpus": 1.0}  # Ray Train has whole ones, and wants a CPU for each.
            self._refuse_what_never_comes(stage, options)
            with waiting_told(stage, options):
                _execute_together(stage, keys, report, options)
            return
        if stage.sequential:
            self.close()
            threads = min(float(stage.run.config.resources.training_threads), most_cpus())
            options = resource_options(stage, threads)
            self._refuse_what_never_comes(stage, options)
            with waiting_told(stage, options):
                _execute_in_order(stage, keys, report, options)
            return
        options = resource_options(stage, float(stage.run.config.resources.threads))
        self._refuse_what_never_comes(stage, options)
        need = self._need(stage)
        if need is not None:
            if not self._elastic:
                refuse_nodes_without_memory(stage, options, need)
            options["memory"] = need
        if self._pool is None or self._pool.options != options:
            self.close()
            self._pool = Pool(options, elastic=self._elastic)
        self._pool.execute(stage, keys, report)

    def _refuse_what_never_comes(self, stage: Stage[Any], options: dict[str, Any]) -> None:
        """Nothing, if the cluster has room for the processes of a stage, or may grow."""
        if self._elastic or room_for(options) >= stage.processes:
            return
        resources, here = stage.run.config.resources, ray.cluster_resources()
        wanted = f"{options['num_gpus']:g} GPUs" if "num_gpus" in options else f"{options['num_cpus']:g} CPUs"
        settings = (
            f"resources.device={resources.device} or resources.gpus_per_worker"
            if "num_gpus" in options
            else "resources.threads or resources.training_threads"
        )
        if stage.processes > 1:
            settings = f"training.workers, {settings}"
        raise UsageError(
            f"stage {stage.name} wants {stage.processes} × {wanted}, and Ray has {here.get('CPU', 0):g} CPUs and "
            f"{here.get('GPU', 0):g} GPUs here, and won't get more: change {settings}, or give --address of a cluster"
        )

    def _need(self, stage: Stage[Any]) -> int | None:
        if self._planned is None or self._planned[0] != stage.run.config:
            need = planned_bytes(stage)
            self._planned = None if need is None else (stage.run.config, need)
        return None if self._planned is None else self._planned[1]

    def close(self) -> None:
        """End the actors, so that what they hold is free for others."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def planned_bytes(stage: Stage[Any]) -> int | None:
    """The most memory that any worker of the run will take, by its plan; None before there are slices to count.

    The same for all stages, so that workers can go from one to the next.
    """
    if not is_prepared(stage.run):  # The table of slices may also be damaged, and is made again.
        return None
    plan = plan_of(stage.run)
    return max(need.host for need in (plan.memory.gradients, plan.tile_need, plan.memory.stripes))


def _execute_in_order(stage: Stage[Any], keys: Sequence[Any], report: Report, options: dict[str, Any]) -> None:
    """One Ray task that does the keys in order and hands each back as it is done; started anew where it stopped."""
    left, strikes = deque(keys), 0
    while left:
        began = time.time()
        remote = ray.remote(num_returns="streaming", max_retries=0, **options)(do_in_order)
        try:
            references: Any = remote.remote(stage, list(left))
            for reference in references:
                ray.get(reference)
                # An epoch can take long: one that this process can't see is the last.
                require_one_storage(stage, [left[0]])
                report(left.popleft())
                strikes, began = 0, time.time()
        except RayError as raised:
            of_work = isinstance(raised, RayTaskError)
            error = cause_of(raised) if isinstance(raised, RayTaskError) else raised
            strikes += 1
            if strikes == TRIES or repeats(error):
                raise stage_error(stage, {left[0]: error}, len(keys), undone=len(left)) from raised
            outcome: Outcome = "error" if of_work else "lost"
            report(left[0], Attempt(outcome, reason(error), started=began, seconds=time.time() - began))
            # Of the last one its answer may be all that was lost.
            while left and str(left[0]) in done_receipts(stage):
                report(left.popleft())


def _execute_together(stage: Stage[Any], keys: Sequence[Any], report: Report, options: dict[str, Any]) -> None:
    """Several processes that do each key together, through Ray Train, which takes seconds to import."""
    wanted = {"CPU": options["num_cpus"], **({"GPU": options["num_gpus"]} if "num_gpus" in options else {})}
    try:
        import_module("ray_tracin.distributed").execute_with_ray_train(stage, keys, report, wanted)
    except Exception as error:
        undone = len({str(key) for key in keys} - done_receipts(stage).keys())
        raise stage_error(stage, {"training together": error}, len(keys), undone=undone) from error


def write_phantoms(folder: Path, patients: int, listen: Listener, *, edition: Edition = "2019", seed: int = 0) -> None:
    """Write synthetic patients, one a Ray task; files that are there are replaced by the same bytes.

    Raises:
        StorageError: the folder can't be written.
        UsageError: it holds something else.
    """
    grades = patient_grades(patients)
    reserve(folder, grades, edition=edition)
    write: Any = ray.remote(num_cpus=1)(write_patient)
    pending = [
        write.remote(folder, number, edition=edition, seed=seed, grade=grade) for number, grade in enumerate(grades)
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
