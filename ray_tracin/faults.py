"""What an error that came back from Ray means: whose fault it is, whether it would repeat, and how it is told."""

import faulthandler
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError, WorkerCrashedError

from ray_tracin.stages import Stage, StageError, out_of_memory
from ray_tracin.vocabulary import ReadError

SHOWN_FAILURES = 5
VERDICT_SECONDS = 2.0
LONGEST_SECONDS = 1e9
"""Thirty years. What ends processes that hang refuses to wait for centuries, or for ever."""
PROCESS_DIED = "worker process has died"
NODE_DIED = "node has died"
OUT_OF_MEMORY = "running low on memory|OutOfMemory"
"""Ray's words: a process ended on a node that is alive, of itself or by Ray's own memory monitor."""


class NoAnswerError(RuntimeError):
    """A key's process ended without a word, and of why nothing is known."""

    def __init__(self) -> None:
        super().__init__("its worker's process died: killed, crashed, out of memory, or hung for twice the lease")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Ray ended the worker because its node ran out of memory."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError) and _says(error, OUT_OF_MEMORY)


def process_died(error: BaseException) -> bool:
    """Whether the worker's process ended, for whatever reason, on a node that is alive."""
    return ran_out_of_memory(error) or (isinstance(error, ActorDiedError) and _says(error, PROCESS_DIED))


def node_died(error: BaseException) -> bool:
    """Whether the worker went with its node."""
    return isinstance(error, ActorDiedError) and _says(error, NODE_DIED)


def _says(error: BaseException, words: str) -> bool:
    return re.search(words, str(error)) is not None


def verdict(actor: Any, error: RayError) -> RayError:
    """What became of an actor: one that is only said to be unavailable is asked again, once, for a moment."""
    if not isinstance(error, ActorUnavailableError):
        return error
    try:
        ray.get(actor.where.remote(), timeout=VERDICT_SECONDS)
    except RayError as later:
        return later if isinstance(later, ActorDiedError) else error
    return error


@contextmanager
def ended_after(seconds: float | None) -> Iterator[None]:
    """Ends this process if the work in the context takes longer, and writes to its log where it hung.

    For work that only Ray waits for, without a limit. It ends processes that hang in compiled code too.
    """
    if seconds is not None:
        faulthandler.dump_traceback_later(min(seconds, LONGEST_SECONDS), exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def cause_of(error: RayTaskError) -> BaseException:
    """What the work itself raised."""
    return error.cause if isinstance(error.cause, BaseException) else error


def repeats(error: BaseException) -> bool:
    """Whether doing the key again would fail again: what the user must mend, or storage that is full."""
    return isinstance(error, ValueError | OSError) and not isinstance(error, TimeoutError | RayError | ReadError)


def device_failed(error: BaseException) -> bool:
    """Whether a GPU failed in a way that leaves its process without it: whatever that does next fails alike."""
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error") and not out_of_memory(error)


def stage_error(stage: Stage[Any], failures: dict[Any, BaseException], keys: int, *, undone: int = 0) -> StageError:
    """What a stage reports at its end about the keys that failed; or, where that came early, the undone ones too."""
    what = (
        f"ended with {undone} of {keys} keys undone, what was done is kept"
        if undone
        else f"{len(failures)} of {keys} keys failed, the others are done and kept"
    )
    lines = [f"{key}: {reason(error)}" for key, error in list(failures.items())[:SHOWN_FAILURES]]
    more = f"\n  … and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
    return StageError(f"stage {stage.name}: {what}:\n  " + "\n  ".join(lines) + more)


def reason(error: BaseException) -> str:
    """The error in one line; all of it where it speaks to the user."""
    if ran_out_of_memory(error):
        return "its worker was ended because the node ran out of memory"
    if process_died(error):
        return "its worker's process died: killed, crashed, or out of memory"
    if isinstance(error, WorkerCrashedError):  # Of a task: only one that hung can have been ended by `ended_after`.
        return "its worker's process died: killed, crashed, out of memory, or hung (see resources.lease_seconds)"
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        return f"its worker went away ({type(error).__name__})"
    text = str(error).strip() or type(error).__name__
    if isinstance(error, ValueError | OSError | NoAnswerError):
        return text
    # CUDA says what happened first, and then what one could do to learn more.
    return f"{type(error).__name__}: {text.splitlines()[0 if text.startswith('CUDA error') else -1]}"
