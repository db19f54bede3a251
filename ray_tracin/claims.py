"""One driver a run: who computes it is written down, refused to a second one, and let go when it dies.

The one idea: claims are numbered files, ``claims/000001.json`` and so on, each created only where there is none of that
number, which every storage does atomically. The highest number holds the run. To take over is to create the next
number; a heartbeat is to write one's own file again; to let go is to delete it. A holder that finds a higher number has
lost the run and stops. Nothing here compares the clocks of two machines: ages are measured by the storage's own clock.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from ray_tracin.objects import Objects

CLAIMS = "claims"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 60.0
"""A driver that gave no sign of life for so long has lost its claim."""
POLL_SECONDS = 1.0
_HELD: set[str] = set()
"""Tokens of the claims that this process holds."""
_NUMBERED = re.compile(rf"{CLAIMS}/(\d{{6}})\.json")


class ClaimHeldError(ValueError):
    """Another driver computes the run; the message says which, where and since when."""


class ClaimLostError(ValueError):
    """Another driver has taken the run over, because this one gave no sign of life for too long."""


@dataclass(frozen=True)
class Holder:
    """A process that drives a run."""

    host: str
    pid: int
    machine: str
    """Boot of the kernel and namespace of process ids: the same where ``pid`` means the same process."""
    process_started: float
    """Seconds since the epoch, by the machine's clock: tells a process from a later one with its id."""
    job: str
    """The Ray job's submission id, if it is one."""
    since: str
    token: str

    @classmethod
    def this_process(cls) -> "Holder":
        """The calling process, with a token of its own at every call."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process_started=psutil.Process().create_time(),
            job=_submission_id(),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            token=uuid.uuid4().hex,
        )

    def exists(self) -> bool | None:
        """Whether the process is there and holds the run; None where that can't be known from this machine."""
        if self.machine != _machine():
            return None
        if self.pid == os.getpid():
            return self.token in _HELD
        try:
            process = psutil.Process(self.pid)
            # In a container without an init nobody buries the dead.
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and abs(process.create_time() - self.process_started) < 1
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


@dataclass(frozen=True)
class _Held:
    number: int
    beat: datetime
    holder: Holder | None
    """None where the claim can't be read."""


class Claim:
    """This process's hold on a run."""

    def __init__(self, objects: Objects, number: int, holder: Holder) -> None:
        self._objects = objects
        self._number = number
        self._holder = holder
        self._renewed = time.monotonic()
        self._lost_to: Holder | str | None = None

    def check(self) -> None:
        """Nothing, as long as the run is this process's. Cheap: storage is asked only where a heartbeat is overdue.

        Raises:
            ClaimLostError: another driver has taken the run.
        """
        if time.monotonic() - self._renewed > STALE_SECONDS:
            self.renew()
        if self._lost_to is not None:
            raise ClaimLostError(
                f"the run at {self._objects.uri} was taken over by {self._lost_to}: this driver had given no sign of "
                f"life for {STALE_SECONDS:.0f} s. What it did is kept; let the other one finish"
            )

    def renew(self) -> None:
        """Give a sign of life, unless the run is another's by now."""
        if not self._is_newest():
            newest = _newest(self._objects)
            self._lost_to = (newest.holder if newest else None) or "another driver"
            return
        self._objects.put(_path(self._number), _to_bytes(self._holder))
        self._renewed = time.monotonic()

    def release(self) -> None:
        """Let the run go, unless it is another's by now. Where storage doesn't answer, the claim ends by itself."""
        _HELD.discard(self._holder.token)
        with suppress(OSError):
            if self._is_newest():
                self._objects.delete([_path(self._number)])

    def _is_newest(self) -> bool:
        newest = _newest(self._objects)
        # Numbers begin again once a run was let go: another driver's claim may have the number of this one.
        return newest is not None and newest.number == self._number and newest.holder in (None, self._holder)


@contextmanager
def driving(objects: Objects) -> Iterator[Claim]:
    """The claim on the run below the URI, held and kept alive as long as the context lasts.

    A claim whose holder may have died on another machine is watched until it expires or gives a sign of life.

    Raises:
        ClaimHeldError: another driver computes the run.
    """
    claim = _take(objects)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(claim, ended), daemon=True, name="claim")
    heart.start()
    try:
        yield claim
    finally:
        ended.set()
        heart.join(HEARTBEAT_SECONDS)
        claim.release()


def current_driver(objects: Objects) -> str | None:
    """Who computes the run below the URI; None where nobody does. Nothing is written: the clock is this machine's."""
    held = _newest(objects)
    if held is None or (held.holder is not None and held.holder.exists() is False):
        return None
    silent = (datetime.now(UTC) - held.beat).total_seconds()
    late = f", silent for {silent:.0f} s" if silent > STALE_SECONDS else ""
    return f"{held.holder or 'another driver'}{late}"


def is_claim(path: str) -> bool:
    """Whether the file is one of those that this module writes."""
    return _NUMBERED.fullmatch(path) is not None


def _beat(claim: Claim, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # Storage that fails for a while: `check` notices if it lasts.
            claim.renew()


def _take(objects: Objects) -> Claim:
    watched: datetime | None = None
    while True:
        held = _newest(objects)
        if held is None or _expired(objects, held):
            claim = _try(objects, (held.number if held else 0) + 1)
            if claim is not None:
                return claim
            continue
        if (held.holder and held.holder.exists()) or (watched is not None and held.beat != watched):
            raise ClaimHeldError(
                f"the run at {objects.uri} is being computed by {held.holder or 'another driver'}. Wait for it or stop "
                f"it; a driver that gives no sign of life for {STALE_SECONDS:.0f} s is taken for dead"
            )
        watched = held.beat
        time.sleep(POLL_SECONDS)


def _try(objects: Objects, number: int) -> Claim | None:
    holder = Holder.this_process()
    _HELD.add(holder.token)  # Before others can see it.
    if not objects.create(_path(number), _to_bytes(holder)):
        _HELD.discard(holder.token)
        return None
    newest = _newest(objects)
    if newest is not None and newest.number > number:  # Others came and went between the look and the attempt.
        objects.delete([_path(number)])
        _HELD.discard(holder.token)
        return None
    objects.delete(_path(older) for older in _numbers(objects) if older < number)
    return Claim(objects, number, holder)


def _expired(objects: Objects, held: _Held) -> bool:
    if held.holder is not None and held.holder.exists() is False:
        return True
    return (_storage_clock(objects) - held.beat).total_seconds() > STALE_SECONDS


def _storage_clock(objects: Objects) -> datetime:
    """The time of the storage itself: that of a file which is written now."""
    path = f"{CLAIMS}/clock-{uuid.uuid4().hex}"
    objects.put(path, b"")
    now = objects.changes(CLAIMS)[path]
    objects.delete([path])
    return now


def _numbers(objects: Objects) -> dict[int, datetime]:
    found = ((_NUMBERED.fullmatch(path), changed) for path, changed in objects.changes(CLAIMS).items())
    return {int(match[1]): changed for match, changed in found if match}


def _newest(objects: Objects) -> _Held | None:
    numbers = _numbers(objects)
    if not numbers:
        return None
    number = max(numbers)
    try:
        return _Held(number, numbers[number], Holder(**json.loads(objects.get(_path(number)))))
    except FileNotFoundError:  # Let go between the listing and the reading.
        return _newest(objects)
    except (ValueError, TypeError):
        return _Held(number, numbers[number], None)


def _path(number: int) -> str:
    return f"{CLAIMS}/{number:06d}.json"


def _to_bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # Not Linux.
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _submission_id() -> str:
    """Ray tells a job's driver about itself by an environment variable."""
    try:
        told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(told["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""
