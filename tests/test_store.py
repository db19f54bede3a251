"""The laws of storage: whole writes, recorded bytes, damage found, nothing silently missing."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier

import numpy as np
import pandas as pd
import pytest

from ray_tracin.objects import Objects, StorageError, StoredFile, absolute_uri, checksum
from ray_tracin.soundness import file_problems
from ray_tracin.store import IncompleteRunError, Receipt, RunStore


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "a run #1")


def _sharded(store: RunStore) -> None:
    store.create_array(
        "g.zarr/epoch_06/train", shape=(10, 70), shards=(4, 96), chunks=(4, 32), dtype="float32", dimensions=("s", "v")
    )


def _receipt(store: RunStore, key: str = "k") -> Receipt:
    receipt = Receipt("stage", key, "f", files=store.take_written(), result={"n": 1, "nan": [float("nan")]})
    store.write_receipt(receipt)
    return receipt


def test_checksum_is_crc32c() -> None:
    assert checksum(b"123456789") == 0xE3069283  # the check value of CRC-32C (Castagnoli)


def test_local_uris_become_absolute_paths(tmp_path: Path) -> None:
    assert absolute_uri(f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"
    assert absolute_uri("s3://bucket/run/") == "s3://bucket/run"
    assert absolute_uri("here") == str(Path.cwd() / "here")


def test_objects_round_trip_and_name_what_is_missing(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "run")
    stored = objects.put("a/b.bin", b"hello")
    assert (objects.get("a/b.bin"), stored) == (b"hello", StoredFile("a/b.bin", 5, checksum(b"hello")))
    assert StoredFile.from_json(stored.to_json()) == stored
    assert objects.sizes() == {"a/b.bin": 5}
    assert (objects.size("a/b.bin"), objects.size("nope")) == (5, None)
    objects.delete(["a/b.bin", "nope"])
    with pytest.raises(FileNotFoundError, match=r"no file 'a/b\.bin' below .*run"):
        objects.get("a/b.bin")


def test_a_file_in_place_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="expected a folder at .*file, found a file"):
        Objects(tmp_path / "file").put("a", b"")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_in_one_line_and_keeps_what_was_written(tiny_disk: Path) -> None:
    store = RunStore(tiny_disk / "run")
    store.create_array("a.zarr/x", shape=(4, 200_000), chunks=(1, 200_000), dtype="float32", dimensions=("a", "b"))
    store.write("a.zarr/x", (slice(0, 1), slice(0, 200_000)), np.ones((1, 200_000), np.float32))
    message = r"cannot write .*: no space left on the device\. Free some and run the same command again"
    with pytest.raises(StorageError, match=message):
        store.write("a.zarr/x", (slice(1, 2), slice(0, 200_000)), np.ones((1, 200_000), np.float32))
    with pytest.raises(StorageError, match=message):
        store.write_bytes("big", b"x" * 2_000_000)
    assert np.array_equal(store.read("a.zarr/x", (slice(0, 1), slice(0, 200_000))), np.ones((1, 200_000)))


def test_every_file_that_zarr_writes_is_recorded_as_it_is_on_disk(store: RunStore) -> None:
    _sharded(store)
    values = np.random.default_rng(0).normal(size=(10, 70)).astype(np.float32)
    for start in (0, 4, 8):
        store.write("g.zarr/epoch_06/train", (slice(start, start + 4),), values[start : start + 4])
    files = store.take_written()
    assert [file.path for file in files if "/c/" in file.path] == [f"g.zarr/epoch_06/train/c/{i}/0" for i in range(3)]
    for file in files:
        data = (Path(store.uri) / file.path).read_bytes()
        assert (len(data), checksum(data)) == (file.size, file.crc32c)
    assert set(store.objects.sizes()) == {file.path for file in files} | {
        "g.zarr/zarr.json",
        "g.zarr/epoch_06/zarr.json",
    } & set(store.objects.sizes())
    assert np.array_equal(RunStore(store.uri).read("g.zarr/epoch_06/train"), values)
    assert store.take_written() == ()


def test_a_chunk_of_fill_values_is_written_too(store: RunStore) -> None:
    store.create_array("a.zarr/x", shape=(4, 3), chunks=(2, 3), dtype="float32", dimensions=("a", "b"))
    store.take_written()
    RunStore(store.uri)  # another opening must not lose the setting
    again = RunStore(store.uri)
    again.write("a.zarr/x", (slice(0, 2), slice(0, 3)), np.full((2, 3), np.nan, np.float32))
    assert [file.path for file in again.take_written()] == ["a.zarr/x/c/0/0"]


def test_a_write_that_cuts_chunks_is_refused(store: RunStore) -> None:
    _sharded(store)
    with pytest.raises(AssertionError, match=r"axis 0 of \[2:6, 0:70\] cuts chunks of 4"):
        store.write("g.zarr/epoch_06/train", (slice(2, 6),), np.zeros((4, 70), np.float32))


DAMAGES = {
    "cut short": lambda data: data[: len(data) // 2],
    "one byte flipped": lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
    "emptied": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "deleted"])
def test_every_damage_to_every_file_is_found_and_nothing_else(store: RunStore, damage: str) -> None:
    _sharded(store)
    store.write("g.zarr/epoch_06/train", (slice(0, 4),), np.ones((4, 70), np.float32))
    store.write_table("t.parquet", pd.DataFrame({"a": [1, 2]}))
    first = _receipt(store, "first")
    store.write("g.zarr/epoch_06/train", (slice(4, 8),), np.ones((4, 70), np.float32))
    second = _receipt(store, "second")
    assert file_problems(store, [first, second], check_bytes=True) == {}
    for file in first.files:
        path = Path(store.uri) / file.path
        whole = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes(DAMAGES[damage](whole))
        found = file_problems(store, [first, second], check_bytes=True)
        assert list(found) == ["stage/first"], file
        assert len(found["stage/first"]) == 1
        assert found["stage/first"][0].startswith(file.path)
        path.write_bytes(whole)
    assert file_problems(store, [first, second], check_bytes=True) == {}


def test_reading_a_damaged_chunk_is_an_error_that_says_what_to_do(store: RunStore) -> None:
    _sharded(store)
    whole = (slice(0, 4),)
    store.write("g.zarr/epoch_06/train", whole, np.ones((4, 70), np.float32))
    path = Path(store.uri) / "g.zarr/epoch_06/train/c/0/0"
    path.write_bytes(DAMAGES["one byte flipped"](path.read_bytes()))
    with pytest.raises(StorageError, match=r"cannot read .* at \[0:4, 0:70\].*ray-tracin verify"):
        store.read("g.zarr/epoch_06/train", whole)


def test_receipts_round_trip_and_a_damaged_one_counts_as_none(store: RunStore) -> None:
    store.write_bytes("x", b"1")
    receipt = _receipt(store, "a/b")
    read = store.read_receipt("stage", "a/b")
    assert read is not None
    assert (read.files, read.fingerprint, read.result["n"]) == (receipt.files, "f", 1)
    assert store.receipts("stage").keys() == {"a/b"}
    path = Path(store.uri) / receipt.path
    for damaged in (b"", b"{", b"[]", b'{"stage": 1}', path.read_bytes()[:-20]):
        path.write_bytes(damaged)
        assert store.read_receipt("stage", "a/b") is None
        assert store.receipts("stage") == {}


def test_releasing_deletes_the_files_and_keeps_the_receipt(store: RunStore) -> None:
    store.write_bytes("x", b"1")
    receipt = _receipt(store)
    store.release([receipt])
    left = store.receipts("stage")["k"]
    assert (left.released, left.files, store.objects.size("x")) == (True, (), None)


def test_keys_are_released_side_by_side(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cloud it is a wait for each: hundreds of shards a checkpoint."""
    receipts = [Receipt("gradients", name, "f", files=(store.objects.put(f"{name}.bin", b"x"),)) for name in "abcd"]
    together, put = Barrier(4, timeout=5), Objects.put

    def waiting(objects: Objects, path: str, data: bytes) -> StoredFile:
        together.wait()
        return put(objects, path, data)

    monkeypatch.setattr(Objects, "put", waiting)
    store.release(receipts)
    assert all(receipt.released for receipt in store.receipts("gradients").values())
    assert not any(path.endswith(".bin") for path in store.objects.sizes())


def test_new_metadata_leaves_the_chunks_alone(store: RunStore) -> None:
    _sharded(store)
    store.write("g.zarr/epoch_06/train", (slice(0, 4),), np.ones((4, 70), np.float32))
    store.create_group("g.zarr/epoch_06", {"layout": "x"})
    _sharded(store)
    assert store.read("g.zarr/epoch_06/train", (slice(0, 4),)).sum() == 280
    assert store.attributes("g.zarr/epoch_06") == {"layout": "x"}


def test_what_is_not_there_yet_points_to_status(store: RunStore) -> None:
    for ask in (store.array, store.read_table, store.attributes):
        with pytest.raises(IncompleteRunError, match=r"t\.zarr/x does not exist yet: `ray-tracin status"):
            ask("t.zarr/x")


def test_tables_round_trip(store: RunStore) -> None:
    table = pd.DataFrame({"slice": [3, 1], "name": ["a", "ü"], "x": [0.5, np.nan]})
    store.write_table("t/a.parquet", table)
    pd.testing.assert_frame_equal(store.read_table("t/a.parquet"), table, check_dtype=False)
    assert list(store.read_table("t/a.parquet", ["x"]).columns) == ["x"]
    assert os.fspath(Path(store.uri) / "t") in [str(p) for p in Path(store.uri).iterdir()]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_written_anew(store: RunStore, damage: str) -> None:
    _sharded(store)
    whole = (slice(8, 10),)
    store.write("g.zarr/epoch_06/train", whole, np.ones((2, 70), np.float32))
    path = Path(store.uri) / "g.zarr/epoch_06/train/c/2/0"
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before))
    store.write("g.zarr/epoch_06/train", whole, np.ones((2, 70), np.float32))
    assert path.read_bytes() == before
