"""Bytes under one URI: a folder, ``s3://…`` or ``gs://…``, with one set of guarantees.

The one idea: whatever is written is written whole (a local file by rename, a cloud object by PUT) and comes back as a
`StoredFile`, its size and CRC-32C, which a receipt keeps. This module knows neither arrays nor tables nor runs.
Credentials and endpoints of cloud storage come from the environment, as obstore and the clouds' own tools read them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import google_crc32c
import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, from_url

T = TypeVar("T")
R = TypeVar("R")

PARALLEL_READS = 8


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


def checksum(data: bytes) -> int:
    """CRC-32C of the bytes."""
    return int(google_crc32c.value(data))


def absolute_uri(uri: str | Path) -> str:
    """The URI with local paths made absolute; ``file://`` URLs become plain paths."""
    text = str(uri)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute())


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
            with explained("open", "", self.uri):
                return from_url(self.uri)
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

    def get(self, path: str) -> bytes:
        """The bytes of the file."""
        with explained("read", path, self.uri):
            return bytes(obstore.get(self.connection, path).bytes())

    def size(self, path: str) -> int | None:
        """The size of the file in bytes, or None where there is none."""
        with explained("read", path, self.uri):
            try:
                return int(obstore.head(self.connection, path)["size"])
            except (FileNotFoundError, NotFoundError):
                return None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every file below the prefix (a folder) and its size in bytes; one listing."""
        with explained("list", prefix, self.uri):
            pages = obstore.list(self.connection, prefix or None)
            return {entry["path"]: entry["size"] for page in pages for entry in page}

    def delete(self, paths: Iterable[str]) -> None:
        """Remove the files; those that don't exist are fine."""
        for path in paths:
            with explained("delete", path, self.uri):
                try:
                    obstore.delete(self.connection, path)
                except (FileNotFoundError, NotFoundError):
                    continue

    def problem(self, file: StoredFile, sizes: Mapping[str, int], *, check_bytes: bool) -> str | None:
        """What is wrong with a stored file, or None: missing, another size, or (if asked) another checksum."""
        size = sizes.get(file.path)
        if size is None:
            return f"{file.path}: missing (expected {file.size} bytes)"
        if size != file.size:
            return f"{file.path}: {size} bytes, expected {file.size}"
        if check_bytes and checksum(self.get(file.path)) != file.crc32c:
            return f"{file.path}: bytes differ from what was written (CRC-32C)"
        return None

    def parallel(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The function of every item, in order, over a few threads: storage waits more than it computes."""
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            return list(pool.map(function, items))


@contextmanager
def explained(verb: str, path: str, uri: str) -> Iterator[None]:
    """Turn what a storage library raises into one line that says what could not be done, where and why."""
    try:
        yield
    except (FileNotFoundError, NotFoundError):
        raise FileNotFoundError(f"no file {path!r} below {uri}") from None
    except (BaseError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot {verb} {uri}/{path}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    reason = _first_line(error)
    if "No space left" in reason or "Disk quota" in reason:
        return "no space left on the device. Free some and run the same command again: what is done is kept"
    return reason


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
