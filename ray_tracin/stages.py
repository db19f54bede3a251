"""What a stage is: keys, idempotent work on one key, and evidence that a key is done.

The one idea: a stage says *what* is to be done; any executor (a plain loop here, a pool of Ray actors in `runtime`,
Ray Data in `datasets`) may do it, in any order, any number of times, with the same result. Executors are told only
the keys that are not done. This module knows no Ray, and none of the stages.
"""

import gc
import json
import os
import re
import resource
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch

from ray_tracin.arithmetic import arithmetic
from ray_tracin.devices import device_name, keep_to_share
from ray_tracin.runs import Run
from ray_tracin.soundness import file_problems, new_file_problems
from ray_tracin.store import Receipt

Key = TypeVar("Key")
T = TypeVar("T")
Result = Mapping[str, Any]
LAYOUT = "layout"
"""The pseudo-stage whose keys are stages: receipts of the metadata that each writes once, before its keys."""


@dataclass(frozen=True)
class Event:
    """What observers of a run are told: a stage began, a key was done, an attempt came to nothing, the stage ended."""

    stage: str
    kind: str
    done: int
    total: int
    key: str = ""
    detail: str = ""


Listener = Callable[[Event], None]
ATTEMPTS = "attempts"
"""The folder of attempts that came to nothing, a file each, until they stand in ``events.parquet``."""
SHARED_SECONDS = 60.0
"""How long a shared folder may take to show one node what another one wrote."""
Outcome = Literal["error", "lost", "hung", "copy"]
"""The work raised; its worker went away; it was ended because its lease ran out; another worker was first."""


@dataclass(frozen=True)
class Attempt:
    """An attempt at a key that did not do it, and what it cost."""

    outcome: Outcome
    error: str
    worker: str = ""
    started: float = 0.0
    """Seconds since the epoch."""
    seconds: float = 0.0


@runtime_checkable
class Report(Protocol):
    """What an executor tells of a key: that it is done, or of an attempt that came to nothing."""

    def __call__(self, key: Any, attempt: Attempt | None = None) -> None:
        """Note it."""


class StageError(ValueError):
    """Keys of a stage failed; everything else was done. The message lists the keys with their reasons."""


@dataclass(frozen=True)
class Stage(ABC, Generic[Key]):
    """A step of a run. Subclasses are small and picklable: they travel to the workers."""

    run: Run
    name: ClassVar[str]
    uses_gpu: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    """Keys depend on the ones before them: one process does them in order."""
    light: ClassVar[bool] = False
    """The work is over sooner than a worker has started: the calling process does it."""

    @property
    def processes(self) -> int:
        """How many processes do a key together, through `open_share`; 1 for all but distributed training."""
        return 1

    @abstractmethod
    def keys(self) -> Sequence[Key]:
        """Every key of the stage; ``str(key)`` names it in receipts. Needs the stages before it to be done."""

    @abstractmethod
    def open(self) -> Callable[[Key], Result]:
        """The work on one key, prepared in the process that will do it (networks loaded, tables read).

        The work writes through ``run.store`` and returns small facts for the receipt.
        """

    def stale(self, key: Key, receipt: Receipt) -> bool:
        """Whether a key that is done must be done again, because what it was made from has changed outside the run."""
        return False

    def write_layout(self) -> None:
        """Create the arrays that the keys write into; called once, before the first key, in one process."""


class StageWorker(Generic[Key]):
    """A process's share of a stage: does a key, then writes its receipt."""

    def __init__(self, stage: Stage[Key], work: Callable[[Key], Result] | None = None) -> None:
        self._stage = stage
        if stage.uses_gpu and not stage.sequential:
            keep_to_share(stage.run)
        self._work = work or stage.open()
        self.name = f"{socket.gethostname()}:{os.getpid()}:{device_name(stage.run) if stage.uses_gpu else 'cpu'}"
        """Host, process and device, as receipts and events have them."""

    def do(self, key: Key) -> Receipt:
        """Do the key and declare it done. An error carries the stage and the key as a note."""
        store = self._stage.run.store
        store.take_written()
        started = time.time()
        try:
            # Networks predict in the arithmetic that regions are differentiated in, where nothing else is asked for.
            with arithmetic():
                result = self._work(key)
        except Exception as error:
            error.add_note(f"in stage {self._stage.name}, key {key}")
            raise
        receipt = Receipt(
            stage=self._stage.name,
            key=str(key),
            fingerprint=self._stage.run.fingerprint,
            files=store.take_written(),
            result=result,
            worker=self.name,
            started=started,
            seconds=time.time() - started,
            peak_memory=peak_memory(),
        )
        store.write_receipt(receipt)
        return receipt


Executor = Callable[[Stage[Any], Sequence[Any], Report], None]
"""Does keys of a stage, anywhere, and reports each one that is done, and each attempt that failed.

Raises `StageError` at the end if some failed; all others were done.
"""


def done_receipts(stage: Stage[Any]) -> dict[str, Receipt]:
    """The receipts of the stage whose files are as they were written, by key; released ones included."""
    return sound_receipts(stage.run, stage.name)


def results_of(stage: Stage[Any]) -> list[Result]:
    """What the keys of a finished stage found, in order."""
    receipts = stage.run.store.receipts(stage.name)
    return [receipts[str(key)].result for key in stage.keys()]  # noqa: SIM118


def sound_receipts(run: Run, name: str) -> dict[str, Receipt]:
    """The receipts of a stage by its name, as `done_receipts`."""
    found = run.store.receipts(name)
    held = {key: receipt for key, receipt in found.items() if receipt.fingerprint == run.fingerprint}
    if run.config.resources.check == "bytes":
        damaged = new_file_problems(run.store, name, held.values())
    else:
        damaged = file_problems(run.store, held.values(), check_bytes=False)
    return {key: receipt for key, receipt in held.items() if f"{name}/{key}" not in damaged}


def complete(stage: Stage[Any], execute: Executor, listen: Listener) -> None:
    """Do what is not done of a stage. Calling it again does nothing.

    Raises:
        StageError: some keys failed; all others were done.
        ValueError: workers wrote where this process can't see it.
    """
    keys = stage.keys()
    finished = {key: receipt for key, receipt in done_receipts(stage).items() if not receipt.released}
    pending = [key for key in keys if str(key) not in finished or stage.stale(key, finished[str(key)])]
    done, total = len(keys) - len(pending), len(keys)
    _ensure_layout(stage)
    if not keys:
        return
    listen(Event(stage.name, "begin", done, total))
    if pending:

        def report(key: Any, attempt: Attempt | None = None) -> None:
            nonlocal done
            if attempt is not None:
                log_attempt(stage, key, attempt)
                detail = f"{attempt.outcome}: {attempt.error}"
                listen(Event(stage.name, "again", done, total, str(key), detail))
                return
            done += 1
            listen(Event(stage.name, "done", done, total, str(key)))

        (execute_serially if stage.light else execute)(stage, pending, report)
        require_one_storage(stage, pending)
    listen(Event(stage.name, "end", done, total, detail=f"{len(pending)} computed"))


def require_one_storage(stage: Stage[Any], done: Sequence[Any]) -> None:
    """Nothing, if this process sees the receipts of keys that workers have done; a shared disk gets a minute for it.

    Raises:
        ValueError: it doesn't: they write on disks of their own.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    while unseen := {str(key) for key in done}.difference(stage.run.store.receipt_keys(stage.name)):
        if time.monotonic() > deadline:
            raise ValueError(
                f"workers have done {len(done)} keys of stage {stage.name}, and the receipts of {len(unseen)}, such as "
                f"{min(unseen)}, are not in {stage.run.uri} as this process sees it: they were written on another "
                "node's disk. Give --run s3://… or gs://…, or a folder that all nodes share"
            )
        time.sleep(1.0)


def log_attempt(stage: Stage[Any], key: Any, attempt: Attempt) -> None:
    """Keep an attempt that came to nothing, in a file of its own: it is written whole and survives any kill."""
    name = f"{ATTEMPTS}/{stage.name}/{key}/{int(attempt.started * 1000)}-{attempt.outcome}.json"
    text = json.dumps({"stage": stage.name, "key": str(key), **asdict(attempt)})
    with suppress(OSError):  # The history of a key matters less than the keys that are left.
        stage.run.store.objects.put(name, text.encode())


def execute_serially(stage: Stage[Any], keys: Sequence[Any], report: Report) -> None:
    """The executor without a cluster: one key after another in this process; the first error ends it."""
    worker = StageWorker(stage)
    for key in keys:
        worker.do(key)
        report(key)


def halving(work: Callable[[int], T], size: int, smallest: int = 1) -> tuple[T, int]:
    """What ``work(size)`` returns, with ``size`` halved as often as the device's memory is too small for it.

    The size that fitted comes second, for the next call to begin with.

    Raises:
        torch.OutOfMemoryError, MemoryError: even the smallest size does not fit.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if size <= smallest or not out_of_memory(error):
                raise
        # Outside the handler: the traceback, which holds the tensors of the attempt, is gone by now.
        size = size // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_OUT_OF_MEMORY = "|".join(
    [
        "can't allocate memory",
        "CUDA out of memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        # Where memory is short its libraries can't begin, and say so in their own words.
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "unable to find an engine to execute this computation",
    ]
)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small, the GPU's or the process's; torch reports the latter as a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(_OUT_OF_MEMORY, str(error)))


def peak_memory() -> int:
    """Highest resident size of this process so far, bytes."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else 1024 * highest  # Linux counts it in KiB.


def _ensure_layout(stage: Stage[Any]) -> None:
    run, store = stage.run, stage.run.store
    receipt = store.read_receipt(LAYOUT, stage.name)
    held = [receipt] if receipt is not None and receipt.fingerprint == run.fingerprint else []
    if held and not file_problems(store, held, check_bytes=run.config.resources.check == "bytes"):
        return
    store.take_written()
    stage.write_layout()
    files = store.take_written()
    if files:
        store.write_receipt(Receipt(LAYOUT, stage.name, run.fingerprint, files=files, started=time.time()))
