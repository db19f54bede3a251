"""The one owner of a run's paths, arrays, tables and receipts: no other module opens Zarr or Parquet.

The one idea: a unit of work is done when its *receipt* says so and the bytes on disk are those that the receipt lists.
Files are written first, the receipt last, so that a process killed at any moment leaves either a finished key or one
that will be computed again. Presence of a chunk proves nothing (Zarr does not store chunks of fill value by default,
and a damaged shard can read as NaN), hence every file that Zarr writes is recorded with its size and CRC-32C.

A writer owns whole chunks (whole shards where an array is sharded); a write that doesn't is refused.

This module knows nothing of networks, regions or Ray. Read `objects` (bytes) below it and `stages` above it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import ObjectStore, WrapperStore

from ray_tracin.objects import Objects, StorageError, StoredFile, checksum, explained, patiently_async, reason_of

CONFIG = "config.yaml"
VERSIONS = "versions.json"
RECEIPTS = "receipts"
IMAGES = "slices.zarr/images"
LABELS = "slices.zarr/labels"
SLICES = "slices.parquet"
SKIPPED = "skipped.parquet"
CHECKPOINTS = "checkpoints.parquet"
EVENTS = "events.parquet"
MASKS = "regions.zarr/mask"
REGION_LABELS = "regions.zarr/labels"
REGIONS = "regions.parquet"
GRADIENTS = "gradients.zarr"
INFLUENCE = "influence.zarr"
TILES = "tiles.zarr"
SKETCHES = "sketches.zarr"
INFLUENCE_TABLE = "tables/influence"
GLOBAL_EXPLAINERS = "tables/global_explainers.parquet"
EXPLAINER_PARTS = "explainers"
FEATURES = "features.zarr"
FEATURE_IMPORTANCE = "tables/feature_importance.parquet"
FEATURE_TRENDS = "tables/feature_trends.parquet"
FEATURE_IMPACT = "tables/feature_impact.parquet"
FEATURE_SET_IMPACT = "tables/feature_set_impact.parquet"

Selection = tuple[slice, ...]
Array = npt.NDArray[Any]
ZarrArray = zarr.Array[Any]
Node = TypeVar("Node")


def checkpoint_path(name: str) -> str:
    """Where the weights of ``epoch_NN`` or ``final`` are."""
    return f"checkpoints/{name}.pt"


class IncompleteRunError(ValueError):
    """Something that is asked for has not been computed yet; the message says which command computes it."""


@dataclass(frozen=True)
class Receipt:
    """The evidence that a key of a stage is done, and what it cost."""

    stage: str
    key: str
    fingerprint: str
    files: tuple[StoredFile, ...] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    """Small facts that later stages need, plain values."""
    released: bool = False
    """The files were deleted on purpose, after everything that needed them was done."""
    worker: str = ""
    started: float = 0.0
    """Seconds since the epoch."""
    seconds: float = 0.0
    peak_memory: int = 0
    """Bytes; the highest resident size of the worker's process so far."""

    @property
    def path(self) -> str:
        """Where the receipt is kept."""
        return f"{RECEIPTS}/{self.stage}/{self.key}.json"

    def to_bytes(self) -> bytes:
        """The receipt as JSON, of which the first field is the CRC-32C of the rest."""
        values = {**self.__dict__, "files": [file.to_json() for file in self.files]}
        rest = json.dumps(values, indent=1, allow_nan=True).encode()[1:]
        return b'{"crc32c": "%08x",' % checksum(rest) + rest

    @classmethod
    def from_bytes(cls, data: bytes) -> "Receipt":
        """The receipt that `to_bytes` wrote.

        Raises:
            ValueError: the bytes are no receipt.
        """
        try:
            values = json.loads(data)
            written = values.pop("crc32c", None)
            if written is not None and written != f"{checksum(data.partition(b',')[2]):08x}":
                raise ValueError("not the bytes that were written")
            files = tuple(StoredFile.from_json(file) for file in values.pop("files"))
            return cls(files=files, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a receipt: {error}") from None


class RunStore:
    """The files of one run. Cheap to pickle; every process opens its own."""

    def __init__(self, uri: str | Path) -> None:
        self.objects = Objects(uri)
        self._arrays: dict[str, ZarrArray] = {}
        self._written: list[StoredFile] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"objects": self.objects, "_arrays": {}, "_written": []}

    @property
    def uri(self) -> str:
        """Where the run is."""
        return self.objects.uri

    # Receipts

    def write_receipt(self, receipt: Receipt) -> None:
        """Declare the key done. To be called after everything it lists was written."""
        self.objects.put(receipt.path, receipt.to_bytes())

    def read_receipt(self, stage: str, key: str) -> Receipt | None:
        """The receipt of a key, or None where there is none or it is damaged (then the key is not done)."""
        try:
            receipt = Receipt.from_bytes(self.objects.get(f"{RECEIPTS}/{stage}/{key}.json"))
        except (FileNotFoundError, ValueError):
            return None
        return receipt if (receipt.stage, receipt.key) == (stage, key) else None

    def receipts(self, stage: str) -> dict[str, Receipt]:
        """Every readable receipt of a stage, by key; one listing and parallel reads."""
        keys = self.receipt_keys(stage)
        found = self.objects.parallel(lambda key: self.read_receipt(stage, key), keys)
        return {key: receipt for key, receipt in zip(keys, found, strict=True) if receipt is not None}

    def receipt_keys(self, stage: str) -> list[str]:
        """The keys of which there is a receipt, readable or not; one listing."""
        prefix = f"{RECEIPTS}/{stage}/"
        paths = [path for path in self.objects.sizes(f"{RECEIPTS}/{stage}") if path.endswith(".json")]
        return [path.removeprefix(prefix).removesuffix(".json") for path in sorted(paths)]

    def release(self, receipts: Iterable[Receipt]) -> None:
        """Delete the files of finished keys that nothing needs any more. The receipts stay and say so."""

        def free(receipt: Receipt) -> None:
            self.write_receipt(replace(receipt, files=(), released=True))
            self.objects.delete(file.path for file in receipt.files)

        self.objects.parallel(free, receipts)  # Workers wait for the next checkpoint meanwhile.

    # Arrays

    def create_group(self, path: str, attributes: Mapping[str, Any]) -> None:
        """Write the metadata of a group such as ``influence.zarr``; what is below it stays."""
        container, inner = _container(path)
        store = self._zarr_store(container)
        self.objects.delete([f"{path}/zarr.json"])
        with explained("write", path, self.uri):
            zarr.create_group(store, path=inner, attributes=dict(attributes), zarr_format=3)

    def create_array(
        self,
        path: str,
        *,
        shape: Sequence[int],
        chunks: Sequence[int],
        dtype: str,
        dimensions: Sequence[str],
        shards: Sequence[int] | None = None,
        fill_value: Any = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the metadata of an array; chunks that are there stay. Every chunk carries a CRC-32C.

        Floats are filled with NaN unless told otherwise, so that what was never written cannot pass for a zero.
        """
        if fill_value is None:
            fill_value = np.nan if np.dtype(dtype).kind == "f" else 0
        container, inner = _container(path)
        self.objects.delete([f"{path}/zarr.json"])
        self._arrays.pop(path, None)
        with explained("write", path, self.uri):
            zarr.create_array(
                self._zarr_store(container),
                name=inner,
                shape=tuple(shape),
                chunks=tuple(chunks),
                shards=tuple(shards) if shards else None,
                dtype=dtype,
                fill_value=fill_value,
                compressors=[Crc32cCodec()],
                dimension_names=list(dimensions),
                attributes=dict(attributes or {}),
                zarr_format=3,
                config={"write_empty_chunks": True},
            )

    def attributes(self, path: str) -> dict[str, Any]:
        """The attributes of a group.

        Raises:
            IncompleteRunError: there is no such group yet.
        """
        return self._opened(zarr.open_group, path, "r").attrs.asdict()

    def readable(self, path: str) -> ZarrArray:
        """The array at the path, open for reading alone.

        Raises:
            IncompleteRunError: there is no such array yet.
        """
        return self._opened(zarr.open_array, path, "r")

    def array(self, path: str) -> ZarrArray:
        """The array at the path, open for reading and for `write`.

        Raises:
            IncompleteRunError: there is no such array yet.
        """
        if path not in self._arrays:
            # write_empty_chunks is no part of the stored metadata: it must be set again at every opening.
            opened = self._opened(zarr.open_array, path, "r+")
            self._arrays[path] = opened.with_config({"write_empty_chunks": True})
        return self._arrays[path]

    def write(self, path: str, selection: Selection, values: Array) -> None:
        """Write a block that covers whole chunks (shards where the array has them); recorded for the receipt.

        Axes that the selection leaves out are whole.
        """
        array = self.array(path)
        selection = _all_axes(array, selection)
        _assert_owns_whole_chunks(array, selection)
        try:
            with explained("write", path, self.uri):
                array[selection] = values
        except Exception:
            if not array.shards:
                raise
            # Zarr reads a shard before it writes it anew: where that fails the damaged one has to go first.
            self.objects.delete(f"{path}/{name}" for name in _shard_names(array, selection))
            with explained("write", path, self.uri):
                array[selection] = values

    def read(self, path: str, selection: Selection | tuple[()] = ()) -> Array:
        """The values of a block; axes that the selection leaves out are whole.

        Raises:
            StorageError: a chunk is damaged; the message says which array and what to do.
        """
        array = self.array(path)
        selection = selection and _all_axes(array, selection)
        try:
            return np.asarray(array[selection] if selection else array[...])
        except Exception as error:
            if isinstance(error, StorageError | MemoryError):
                raise
            # Codecs report damage as ValueError or RuntimeError, and a cut file as anything from IndexError up.
            raise StorageError(
                f"cannot read {self.uri}/{path} at {_shown(selection)}: {reason_of(error)}. "
                f"`ray-tracin verify --run {self.uri}` finds damaged files, running the stage again replaces them"
            ) from error

    # Tables and other files

    def write_table(
        self,
        path: str,
        table: pd.DataFrame | pa.Table,
        *,
        about: Mapping[str, str] | None = None,
        recorded: bool = True,
    ) -> None:
        """Write a Parquet file (zstd); recorded for the receipt unless it is to be written again before it is done.

        What it is ``about`` becomes metadata of its schema.
        """
        arrow = pa.Table.from_pandas(table, preserve_index=False) if isinstance(table, pd.DataFrame) else table
        if about:
            arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **about})
        sink = BytesIO()
        pq.write_table(arrow, sink, compression="zstd")
        written = self.objects.put(path, sink.getvalue())
        if recorded:
            self._written.append(written)

    def read_table(self, path: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """A Parquet file as a data frame.

        Raises:
            IncompleteRunError: there is no such table yet.
        """
        try:
            data = self.objects.get(path)
        except FileNotFoundError:
            raise self._missing(path) from None
        frame = pq.read_table(BytesIO(data), columns=list(columns) if columns else None).to_pandas()
        assert isinstance(frame, pd.DataFrame)
        return frame

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write any file; recorded for the receipt."""
        self._written.append(self.objects.put(path, data))

    def take_written(self) -> tuple[StoredFile, ...]:
        """The files written since the last call, once each (the last write counts), sorted by path."""
        latest = {file.path: file for file in self._written}
        self._written.clear()
        return tuple(latest[path] for path in sorted(latest))

    def _missing(self, path: str) -> IncompleteRunError:
        hint = f"`ray-tracin status --run {self.uri}` says what is missing"
        return IncompleteRunError(f"{self.uri}/{path} does not exist yet: {hint}")

    def _opened(self, how: Callable[..., Node], path: str, mode: str) -> Node:
        """The array or group at a path that is there: to look for one that isn't would make its folder."""
        container, inner = _container(path)
        if self.objects.is_local and not Path(self.uri, container).is_dir():
            raise self._missing(path)
        try:
            return how(self._zarr_store(container), path=inner, mode=mode, zarr_format=3)
        except (FileNotFoundError, KeyError):
            raise self._missing(path) from None

    def _zarr_store(self, container: str) -> Store:
        return _RecordingStore(ObjectStore(self.objects.below(container).connection), container, self._written)


class _RecordingStore(WrapperStore[Any]):
    """A Zarr store that notes the exact bytes of everything that is written through it."""

    def __init__(self, store: Any, container: str, written: list[StoredFile]) -> None:
        super().__init__(store)
        self._container = container
        self._log = written

    def _with_store(self, store: Any) -> "_RecordingStore":
        return type(self)(store, self._container, self._log)

    def _note(self, key: str, value: Buffer) -> None:
        self._log.append(StoredFile.of(f"{self._container}/{key}", value.to_bytes()))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await patiently_async(lambda: self._store.get(key, prototype, byte_range))

    async def set(self, key: str, value: Buffer) -> None:
        await patiently_async(lambda: self._store.set(key, value))
        self._note(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Zarr's way to write the metadata of the groups above an array. One process does it: a plain write will do."""
        held = await self.get(key, default_buffer_prototype())
        if held is not None and _attributes_of(held.to_bytes()):
            self._note(key, held)  # Written with `create_group`.
        else:
            await self.set(key, value)


def _attributes_of(metadata: bytes) -> Any:
    try:
        return json.loads(metadata).get("attributes")
    except (ValueError, AttributeError):
        return None


def _container(path: str) -> tuple[str, str]:
    """``a.zarr/b/c`` → (``a.zarr``, ``b/c``): each ``.zarr`` folder is a Zarr hierarchy of its own."""
    container, _, inner = path.partition("/")
    return container, inner


def _all_axes(array: ZarrArray, selection: Selection) -> Selection:
    return (*selection, *(slice(0, length) for length in array.shape[len(selection) :]))


def _assert_owns_whole_chunks(array: ZarrArray, selection: Selection) -> None:
    unit = array.shards or array.chunks
    assert len(selection) == len(unit), f"{array.path}: one slice an axis, got {selection}"
    for axis, (part, step, length) in enumerate(zip(selection, unit, array.shape, strict=True)):
        start, stop, stride = part.indices(length)
        whole = stride == 1 and start % step == 0 and (stop % step == 0 or stop == length)
        assert whole, f"{array.path}: axis {axis} of {_shown(selection)} cuts chunks of {step}"


def _shard_names(array: ZarrArray, selection: Selection) -> Iterator[str]:
    unit = array.shards or array.chunks
    parts = [part.indices(length) for part, length in zip(selection, array.shape, strict=True)]
    ranges = [range(start // step, -(-stop // step)) for (start, stop, _), step in zip(parts, unit, strict=True)]
    return ("/".join(map(str, ("c", *place))) for place in product(*ranges))


def _shown(selection: Selection | tuple[()]) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in selection) + "]"
