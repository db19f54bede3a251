"""A stage on whose keys things go wrong on purpose, and a count of what was attempted."""

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ray_tracin.gradients import NonFiniteGradientError
from ray_tracin.stages import Result, Stage
from ray_tracin.vocabulary import ReadError, SliceRange

ARRAY = "squares.zarr/x"
BROKEN = "BROKEN_DEVICE"


@dataclass(frozen=True)
class Square(Stage[SliceRange]):
    """Writes i² at i; every attempt at a key leaves a file, and ``trouble`` says what goes wrong at which key."""

    attempts: Path
    trouble: dict[int, str] = field(default_factory=dict)
    length: int = 12
    seconds: float = 0.0
    name: ClassVar[str] = "square"

    def keys(self) -> Sequence[SliceRange]:
        return [SliceRange(start, start + 2) for start in range(0, self.length, 2)]

    def write_layout(self) -> None:
        self.run.store.create_array(ARRAY, shape=(self.length,), chunks=(2,), dtype="float32", dimensions=("i",))

    def open(self) -> Callable[[SliceRange], Result]:
        return self._square

    def expected(self) -> np.ndarray:
        return np.arange(self.length, dtype=np.float32) ** 2

    def tries(self, start: int | None = None) -> int:
        """Attempts at a key, or at all of them."""
        return len(list(self.attempts.glob("*-*" if start is None else f"{start}-*")))

    def workers_seen(self) -> set[int]:
        """The processes that attempted anything."""
        return {int(path.name.split("-")[2]) for path in self.attempts.iterdir()}

    def _square(self, key: SliceRange) -> Result:
        if BROKEN in os.environ:
            _break_device()
        before = self.tries(key.start)
        (self.attempts / f"{key.start}-{before}-{os.getpid()}-{time.monotonic_ns()}").touch()
        what, _, when = self.trouble.get(key.start, "").partition(" ")
        if what and (when == "always" or before == 0):
            TROUBLES[what]()
        time.sleep(self.seconds)
        values = np.arange(key.start, key.stop, dtype=np.float32) ** 2
        self.run.store.write(ARRAY, (slice(key.start, key.stop),), values)
        return {"sum": float(values.sum())}


@dataclass(frozen=True)
class Refusing(Square):
    """The same, which no worker on a sick node can begin."""

    name: ClassVar[str] = "refusing"

    def open(self) -> Callable[[SliceRange], Result]:
        if "SICK" in os.environ:
            raise ValueError("expected a GPU, this node's is broken")
        return super().open()


@dataclass(frozen=True)
class GpuSquare(Square):
    """The same, on a GPU."""

    name: ClassVar[str] = "gpu-square"
    uses_gpu: ClassVar[bool] = True


def _raise(error: Exception) -> None:
    raise error


def _break_device() -> None:
    """Leave this process, as CUDA does after an error, unable to do anything more; in the words of PyTorch 2.13."""
    os.environ[BROKEN] = "1"
    raise RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported at "
        "some other API call.\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    )


def _exhaust_memory() -> None:
    """Ask for more than the process may have, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        np.ones(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _fill_memory() -> None:
    """Take 9 GiB, a little at a time, and hold them: where that is too much, somebody else ends the process."""
    held = []
    for _ in range(288):
        held.append(np.ones(4 << 20))
        time.sleep(0.01)
    time.sleep(5)


TROUBLES: dict[str, Callable[[], Any]] = {
    "value": lambda: _raise(ValueError("expected a number that can be squared")),
    "error": lambda: _raise(RuntimeError("the device is lost")),
    "unread": lambda: _raise(ReadError("the disk did not answer")),
    # Not made of its text alone: it can be pickled, and not unpickled.
    "special": lambda: _raise(NonFiniteGradientError(1, 2, "head")),
    "device": _break_device,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(120),
    "memory": _exhaust_memory,
    "fills": _fill_memory,
    "sick": lambda: os.kill(os.getpid(), signal.SIGKILL) if os.environ.get("SICK") else None,
}
"""First word of a trouble, which happens at the first attempt, or ``always``."""
