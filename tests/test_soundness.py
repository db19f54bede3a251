"""What was read and found right is not read again until it changes; damage is found all the same."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_tracin import objects
from ray_tracin.objects import Objects, checksum
from ray_tracin.soundness import CHECKED, file_problems, new_file_problems
from ray_tracin.store import Receipt, RunStore

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose bytes are read, as they are."""
    found: list[str] = []
    read = Objects.checksum

    def counted(self: Objects, path: str) -> int:
        found.append(path)
        return read(self, path)

    monkeypatch.setattr(Objects, "checksum", counted)
    return found


def write(store: RunStore, key: str, *paths: str) -> Receipt:
    for path in paths:
        store.write_bytes(path, path.encode() * 100)
    receipt = Receipt("stage", key, "fingerprint", files=store.take_written())
    store.write_receipt(receipt)
    return receipt


def grow_old(store: RunStore, seconds: float = HOUR) -> None:
    for path in Path(store.uri).rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def taken(reads: list[str]) -> list[str]:
    found = sorted(reads)
    reads.clear()
    return found


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def test_what_did_not_change_is_read_once(store: RunStore, reads: list[str]) -> None:
    receipts = [write(store, "a", "x/1", "x/2"), write(store, "b", "y.bin")]
    grow_old(store)
    assert new_file_problems(store, "stage", receipts) == {}
    assert taken(reads) == ["x/1", "x/2", "y.bin"]
    assert new_file_problems(RunStore(store.uri), "stage", receipts) == {}
    assert taken(reads) == []
    receipts.append(write(store, "c", "x/3"))
    assert new_file_problems(store, "stage", receipts) == {}
    assert taken(reads) == ["x/3"]


def test_what_is_new_is_read_until_it_has_settled(store: RunStore, reads: list[str]) -> None:
    receipts = [write(store, "a", "x/1")]
    for _ in range(2):
        assert new_file_problems(store, "stage", receipts) == {}
        assert taken(reads) == ["x/1"]


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b"short"), Path.unlink])
def test_damage_after_a_look_is_found_and_mended_files_are_read_again(
    store: RunStore, reads: list[str], damage: Callable[[Path], None]
) -> None:
    receipts = [write(store, "a", "x/1", "x/2"), write(store, "b", "y.bin")]
    grow_old(store)
    new_file_problems(store, "stage", receipts)
    path = Path(store.uri) / "x/1"
    whole = path.read_bytes()
    damage(path)
    assert list(new_file_problems(store, "stage", receipts)) == ["stage/a"]
    path.write_bytes(whole)
    grow_old(store, HOUR / 2)
    taken(reads)
    assert new_file_problems(store, "stage", receipts) == {}
    assert "x/1" in taken(reads)


def test_what_the_storage_does_not_tell_is_found_where_every_byte_is_read(store: RunStore) -> None:
    receipts = [write(store, "a", "x/1")]
    grow_old(store)
    new_file_problems(store, "stage", receipts)
    path = Path(store.uri) / "x/1"
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert new_file_problems(store, "stage", receipts) == {}
    assert list(file_problems(store, receipts, check_bytes=True)) == ["stage/a"]


def test_a_receipt_of_other_bytes_does_not_match_what_was_seen(store: RunStore) -> None:
    first = write(store, "a", "x/1")
    grow_old(store)
    new_file_problems(store, "stage", [first])
    other = Receipt("stage", "a", "fingerprint", files=(objects.StoredFile("x/1", first.files[0].size, 7),))
    assert list(new_file_problems(store, "stage", [other])) == ["stage/a"]


def test_a_note_that_is_damaged_or_can_t_be_kept_costs_reads_only(store: RunStore, reads: list[str]) -> None:
    receipts = [write(store, "a", "x/1")]
    grow_old(store)
    new_file_problems(store, "stage", receipts)
    note = Path(store.uri) / CHECKED / "stage.json"
    for text in ("{", "[]"):
        note.write_text(text)
        taken(reads)
        assert new_file_problems(store, "stage", receipts) == {}
        assert taken(reads) == ["x/1"]
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("a file where the folder would be")
    assert new_file_problems(store, "stage", receipts) == {}
    assert taken(reads) == ["x/1"]


def test_checksums_of_pieces_are_those_of_the_whole(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PIECE_BYTES", 64)
    for length in (0, 1, 64, 65, 1000):
        data = os.urandom(length)
        store.objects.put("file", data)
        assert store.objects.checksum("file") == checksum(data)
