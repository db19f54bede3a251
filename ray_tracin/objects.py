"""Bytes under one URI: a folder, ``s3://…`` or ``gs://…``, with one set of guarantees.

The one idea: whatever is written is written whole (a local file by rename, a cloud object by PUT) and comes back as a
`StoredFile`, its size and CRC-32C, which a receipt keeps. This module knows neither arrays nor tables nor runs.
Credentials and endpoints of cloud storage come from the environment, as obstore and the clouds' own tools read them.
A request that fails for a reason that may pass (5xx, throttling, a lost connection) is tried again for as long as
`patience` says; whatever is left is a `StorageError`.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import google_crc32c
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

T = TypeVar("T")
R = TypeVar("R")

PARALLEL_READS = 8
PIECE_BYTES = 16 << 20
"""Of a file whose checksum is computed: shards are large, and several are read at a time."""
SETTLED = timedelta(minutes=1)
"""A file that was written longer ago has a mark that another write would change: clocks of file systems take steps."""
PATIENCE = "RAY_TRACIN_STORAGE_PATIENCE"
"""Environment variable: seconds for which a request to cloud storage is tried again (default 180)."""
RETRIES = 1000
"""More than patience lasts for: it, and not a count, says when to give up."""
FIRST_BACKOFF, LONGEST_BACKOFF, GROWTH = 0.1, 15.0, 3
"""Seconds between tries. obstore draws each pause evenly between the first and the last one times the growth."""
TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "15min"}
"""A shard may be large, so the whole request may take long; a connection that stalls is noticed by its reads."""
CLIENT_SETTINGS = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes", *TIMEOUTS)
PASSES = re.compile("error sending request|response body error|timed out|connection (closed|reset)")
"""What obstore says of a lost connection. It tries reads and plain writes again itself, but no listing, no deletion."""
TRIED_AGAIN = re.compile(f"after [0-9]+ retries|{PASSES.pattern}")
NO_CREDENTIALS = "http://169.254.169.254"
"""The metadata service of a cloud machine, which is asked where the environment holds no credentials."""
PREFIXES = {"s3": "AWS", "s3a": "AWS", "gs": "GOOGLE", "az": "AZURE", "abfs": "AZURE", "abfss": "AZURE"}
"""By scheme, how the environment variables begin that name credentials, endpoint and client settings."""


class StorageError(OSError):
    """Bytes could not be read or written; the message says which, where, and why."""


@dataclass(frozen=True)
class StoredFile:
    """A file as it was written: path below the URI, size in bytes, CRC-32C (Castagnoli)."""

    path: str
    size: int
    crc32c: int

    @classmethod
    def of(cls, path: str, data: bytes) -> "StoredFile":
        """The record of these bytes."""
        return cls(path, len(data), checksum(data))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as receipts store them."""
        return {"path": self.path, "bytes": self.size, "crc32c": f"{self.crc32c:08x}"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StoredFile":
        """The record that `to_json` wrote."""
        return cls(values["path"], int(values["bytes"]), int(values["crc32c"], 16))


@dataclass(frozen=True)
class FileState:
    """A file as the storage lists it."""

    size: int
    """Bytes."""
    mark: str
    """Another one after every write; empty for a file so new that a second write might not show."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "FileState":
        """From an entry of a listing."""
        settled = datetime.now(UTC) - entry["last_modified"] > SETTLED
        return cls(entry["size"], (entry["e_tag"] or "") if settled else "")


def checksum(data: bytes) -> int:
    """CRC-32C of the bytes."""
    return int(google_crc32c.value(data))


def absolute_uri(uri: str | Path) -> str:
    """The URI with local paths made absolute; ``file://`` URLs become plain paths."""
    text = str(uri)
    if not text:
        raise ValueError("expected a folder or a URL, got an empty name: is a variable not set?")
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute())


def patience() -> timedelta:
    """For how long a request to cloud storage is tried again.

    Raises:
        ValueError: the environment variable is no number of seconds.
    """
    text = os.environ.get(PATIENCE, "180")
    try:
        return timedelta(seconds=float(text))
    except ValueError:
        raise ValueError(f"{PATIENCE} is {text!r}: expected a number of seconds, such as 180") from None


def connect(uri: str) -> Any:
    """The obstore store of a cloud URL, configured from the environment, patient with errors that pass.

    Raises:
        StorageError: the URL's scheme is not one of a cloud storage that is known.
    """
    scheme = urlsplit(uri).scheme
    if scheme not in PREFIXES:
        known = ", ".join(f"{name}://" for name in PREFIXES)
        raise StorageError(f"cannot open {uri}: expected a folder, or a URL that begins with {known}")
    # Options that are given replace the environment's, so these are read from there too.
    named = {name: os.environ.get(f"{PREFIXES[scheme]}_{name.upper()}") for name in CLIENT_SETTINGS}
    options: Any = {**TIMEOUTS, **{name: value for name, value in named.items() if value is not None}}
    retries: Any = {
        "max_retries": RETRIES,
        "retry_timeout": patience(),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_BACKOFF),
            "max_backoff": timedelta(seconds=LONGEST_BACKOFF),
            "base": GROWTH,
        },
    }
    with explained("open", "", uri):
        return from_url(uri, client_options=options, retry_config=retries)


class Objects:
    """Whole-file reads and writes below a URI. Cheap to pickle: a process opens its own connection.

    Raises (all methods):
        StorageError: the storage refused; a full disk is named as such.
        FileNotFoundError: the file to read does not exist.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = absolute_uri(uri)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    @property
    def is_local(self) -> bool:
        """Whether the URI is a folder of this machine (or mounted on it)."""
        return "://" not in self.uri

    @cached_property
    def connection(self) -> Any:
        """The obstore store behind it, which Zarr can read and write."""
        if not self.is_local:
            return connect(self.uri)
        folder = Path(self.uri)
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"expected a folder at {folder}, found a file: give another --run")
        try:
            return LocalStore(folder, mkdir=True)
        except (BaseError, OSError) as error:
            raise StorageError(f"cannot create the folder {folder}: {_first_line(error)}") from None

    def below(self, path: str) -> "Objects":
        """The same storage, one folder down."""
        return Objects(f"{self.uri}/{path}")

    def put(self, path: str, data: bytes) -> StoredFile:
        """Write the file whole, replacing one that exists."""
        with explained("write", path, self.uri):
            obstore.put(self.connection, path, data)
        return StoredFile.of(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write the file whole if there is none of that name; False where there is one. Of many who try, one succeeds.

        The data must be the caller's own (hold a random token): a try whose answer was lost is known by its bytes.
        """
        with explained("write", path, self.uri):
            try:
                patiently(lambda: obstore.put(self.connection, path, data, mode="create"))
            except AlreadyExistsError:
                return self.get(path) == data
            return True

    def get(self, path: str) -> bytes:
        """The bytes of the file."""
        with explained("read", path, self.uri):
            return bytes(obstore.get(self.connection, path).bytes())

    def checksum(self, path: str) -> int:
        """CRC-32C of the file's bytes, which are read a piece at a time."""
        found = 0
        with explained("read", path, self.uri):
            for piece in self._pieces(path):
                found = google_crc32c.extend(found, piece)
        return int(found)

    def _pieces(self, path: str) -> Iterator[bytes]:
        if self.is_local:
            with Path(self.uri, path).open("rb") as file:
                yield from iter(lambda: file.read(PIECE_BYTES), b"")
        else:
            size = obstore.head(self.connection, path)["size"]
            for start in range(0, size, PIECE_BYTES):
                stop = min(start + PIECE_BYTES, size)
                yield bytes(obstore.get_range(self.connection, path, start=start, end=stop))

    def size(self, path: str) -> int | None:
        """The size of the file in bytes, or None where there is none."""
        state = self.state(path)
        return None if state is None else state.size

    def state(self, path: str) -> FileState | None:
        """The state of the file, or None where there is none."""
        with explained("read", path, self.uri):
            try:
                return FileState.of(obstore.head(self.connection, path))
            except (FileNotFoundError, NotFoundError):
                return None

    def states(self, prefix: str) -> dict[str, FileState]:
        """The state of every file below the prefix (a folder); one listing."""
        return {entry["path"]: FileState.of(entry) for entry in self._listed(prefix)}

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every file below the prefix (a folder) and its size in bytes; one listing."""
        return {entry["path"]: entry["size"] for entry in self._listed(prefix)}

    def changes(self, prefix: str) -> dict[str, datetime]:
        """When every file below the prefix (a folder) was last changed, by the storage's clock; one listing."""
        return {entry["path"]: entry["last_modified"] for entry in self._listed(prefix)}

    def _listed(self, prefix: str) -> Sequence[Any]:
        with explained("list", prefix, self.uri):
            return patiently(lambda: obstore.list(self.connection, prefix or None).collect())

    def everything(self) -> list[str]:
        """Every file below the URI, sorted; in a folder also those that listings pass over (an interrupted write's)."""
        if not self.is_local:
            return sorted(self.sizes())
        root = Path(self.uri)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())

    def delete(self, paths: Iterable[str]) -> None:
        """Remove the files; those that don't exist are fine."""
        for path in paths:
            with explained("delete", path, self.uri):
                try:
                    if self.is_local:
                        Path(self.uri, path).unlink()
                    else:
                        patiently(partial(obstore.delete, self.connection, path))
                except (FileNotFoundError, NotFoundError):
                    continue

    def parallel(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The function of every item, in order, over a few threads: storage waits more than it computes."""
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            return list(pool.map(function, items))


def patiently(ask: Callable[[], R]) -> R:
    """What the request returns; tried again while connections get lost, for as long as `patience` says."""
    for pause in _pauses():
        try:
            return ask()
        except BaseError as error:
            if not PASSES.search(_first_line(error)):
                raise
        time.sleep(pause)
    return ask()


async def patiently_async(ask: Callable[[], Awaitable[R]]) -> R:
    """As `patiently`, for Zarr."""
    for pause in _pauses():
        try:
            return await ask()
        except BaseError as error:
            if not PASSES.search(_first_line(error)):
                raise
        await asyncio.sleep(pause)
    return await ask()


def _pauses() -> Iterator[float]:
    until, wait = time.monotonic() + patience().total_seconds(), FIRST_BACKOFF
    while time.monotonic() + wait < until:
        yield wait
        wait = min(random.uniform(FIRST_BACKOFF, GROWTH * wait), LONGEST_BACKOFF)


@contextmanager
def explained(verb: str, path: str, uri: str) -> Iterator[None]:
    """Turn what a storage library raises into one line that says what could not be done, where and why."""
    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        if verb == "write":
            raise StorageError(f"cannot write {uri}/{path}: {_first_line(error)}. Is there such a bucket?") from None
        raise FileNotFoundError(f"no file {path!r} below {uri}") from None
    except (BaseError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot {verb} {uri}/{path}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """The first line of what a storage library raised, and what to do where that is known."""
    reason = _first_line(error)
    if "No space left" in reason or "Disk quota" in reason:
        return "no space left on the device. Free some and run the same command again: what is done is kept"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or NO_CREDENTIALS in reason:
        return (
            f"{reason}. The storage refuses these credentials, or there are none in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; GOOGLE_SERVICE_ACCOUNT), or no role"
        )
    if isinstance(error, BaseError) and TRIED_AGAIN.search(reason):
        return f"{reason}. The storage did not recover in time. Run the same command again: what is done is kept"
    return reason


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
