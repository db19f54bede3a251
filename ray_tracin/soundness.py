"""Which receipts are sound: whether the files of a key are still the bytes that it wrote.

The one idea: a file that was read once and found right needs no second look while its storage says that nobody wrote it
since. So a command that goes on with a terabyte of shards reads listings, and `integrity.verify` reads the bytes.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from ray_tracin.objects import FileState, StorageError, StoredFile
from ray_tracin.store import Receipt, RunStore

FEW = 16
"""Files of a folder that are asked for one by one. More are listed, and all that the folder has with them."""
CHECKED = "checked"
"""Folder of what was read and found right, a file a stage. Without it everything is read once more."""

Problems = dict[str, list[str]]
"""What is wrong with the files of each receipt, by ``stage/key``; keys without a problem are not listed."""


def file_problems(store: RunStore, receipts: Iterable[Receipt], *, check_bytes: bool) -> Problems:
    """What is wrong with the files of receipts: missing, of another size, or (if asked) with other bytes."""
    held = list(receipts)
    return _problems(store, held, _states(store, held), lambda file: check_bytes)


def new_file_problems(store: RunStore, stage: str, receipts: Iterable[Receipt]) -> Problems:
    """As `file_problems`, but of a stage's files only those are read that may have changed since they last were.

    Whether they have is told by the storage's mark of each, which is kept from one call to the next.
    """
    held, path = list(receipts), f"{CHECKED}/{stage}.json"
    states, seen = _states(store, held), _seen(store, path)
    marks = {file.path: f"{states[file.path].mark} {file.crc32c:08x}" for file in _files(held) if file.path in states}
    found = _problems(store, held, states, lambda file: seen.get(file.path) != marks[file.path])
    sound = _files(receipt for receipt in held if _name(receipt) not in found)
    now_seen = {file.path: marks[file.path] for file in sound if states[file.path].mark}
    if now_seen != seen:
        with suppress(StorageError):  # Who may not write reads everything again the next time.
            store.objects.put(path, json.dumps(now_seen).encode())
    return found


def _problems(
    store: RunStore,
    held: Sequence[Receipt],
    states: Mapping[str, FileState],
    is_read: Callable[[StoredFile], bool],
) -> Problems:
    def problem(file: StoredFile) -> str | None:
        state = states.get(file.path)
        if state is None:
            return f"{file.path}: missing (expected {file.size} bytes)"
        if state.size != file.size:
            return f"{file.path}: {state.size} bytes, expected {file.size}"
        if is_read(file) and store.objects.checksum(file.path) != file.crc32c:
            return f"{file.path}: bytes differ from what was written (CRC-32C)"
        return None

    def check(receipt: Receipt) -> list[str]:
        return [found for file in receipt.files if (found := problem(file))]

    checked = store.objects.parallel(check, held)
    return {_name(receipt): found for receipt, found in zip(held, checked, strict=True) if found}


def _states(store: RunStore, held: Iterable[Receipt]) -> dict[str, FileState]:
    wanted: dict[str, list[str]] = {}
    for file in _files(held):
        wanted.setdefault(file.path.split("/", 1)[0], []).append(file.path)
    alone = [path for paths in wanted.values() if len(paths) <= FEW for path in paths]
    asked = zip(alone, store.objects.parallel(store.objects.state, alone), strict=True)
    states = {path: state for path, state in asked if state is not None}
    for top, paths in wanted.items():
        if len(paths) > FEW:
            states.update(store.objects.states(top))
    return states


def _seen(store: RunStore, path: str) -> dict[str, str]:
    try:
        seen = json.loads(store.objects.get(path))
    except (OSError, ValueError):
        return {}
    return seen if isinstance(seen, dict) else {}


def _files(receipts: Iterable[Receipt]) -> Iterator[StoredFile]:
    return (file for receipt in receipts for file in receipt.files)


def _name(receipt: Receipt) -> str:
    return f"{receipt.stage}/{receipt.key}"
