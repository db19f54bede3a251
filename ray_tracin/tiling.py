"""The stage that multiplies gradients with gradients: the kernels of the checkpoints, a tile a key.

``tiles.zarr`` (documented here, its owner) holds the kernels as they are computed, blocks of slices against blocks of
slices. Of the symmetric train–train kernel only the blocks on and above the diagonal exist. `assembly` puts them into
``influence.zarr``.

The packed rows of a block have two sources: the shards in ``gradients.zarr``, read a layer at a time, or the network
itself (*fused*), whose rows stay in the memory of the device and never touch a disk. Both give the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.attribution import ShardDifferentiator, gradients_path, row_format
from ray_tracin.devices import pick_device
from ray_tracin.influence import EXPANDED_VALUES, SegmentReader, tile_kernel
from ray_tracin.layers import Layout, Segment
from ray_tracin.rounding import RowFormat
from ray_tracin.runs import Run
from ray_tracin.stages import Result, Stage, halving
from ray_tracin.store import Array
from ray_tracin.vocabulary import GradientShard, Precision, QuerySet, Tile, checkpoint_name, ranges

READ_WORDS = 1 << 17
"""Words of a slice that a tile worker reads at a time, if a layer doesn't have more."""
LEAST_EXPANDED_VALUES = 1 << 16
"""The fewest that it expands at a time, where memory is short."""

Block = tuple[int, QuerySet, int]
"""A checkpoint's epoch, a query set, and the number of a block of its slices."""


def tiles_path(epoch: int, query_set: QuerySet) -> str:
    """Where the tiles of a query set at a checkpoint are."""
    return f"{paths.TILES}/{checkpoint_name(epoch)}/{query_set}"


def blocks(run: Run, query_set: QuerySet) -> list[tuple[int, int]]:
    """The blocks of positions of a query set that tiles are made of."""
    return ranges(len(run.query_slices(query_set)), run.config.influence.tile_slices)


@dataclass(frozen=True)
class ComputeTiles(Stage[Tile]):
    """Multiply gradients with gradients: the kernels of the checkpoints, a tile a key."""

    epochs: tuple[int, ...]
    fused: bool = False
    """Whether rows are made anew, in memory, instead of read from the gradient shards."""
    name: ClassVar[str] = "tiles"
    uses_gpu: ClassVar[bool] = True

    def keys(self) -> Sequence[Tile]:
        """Every tile; of the symmetric train–train kernel those on and above the diagonal."""
        train = range(len(blocks(self.run, "train")))
        return [
            Tile(epoch, name, query, other)
            for epoch in self.epochs
            for name in self.run.query_sets
            for query in range(len(blocks(self.run, name)))
            for other in train
            if name != "train" or query <= other
        ]

    def write_layout(self) -> None:
        """Create the arrays of every influence checkpoint."""
        run, side, classes = self.run, self.run.config.influence.tile_slices, len(self.run.classes)
        train = len(blocks(run, "train"))
        for epoch in run.config.influence_epochs():
            for name in run.query_sets:
                queries = len(blocks(run, name))
                run.store.create_array(
                    tiles_path(epoch, name),
                    shape=(queries, train, classes, side, classes, side),
                    chunks=(1, 1, classes, side, classes, side),
                    dtype="float32",
                    dimensions=("query_block", "train_block", "query_class", "query", "train_class", "train"),
                )
                run.store.create_array(
                    f"{tiles_path(epoch, name)}_norm2",
                    shape=(queries, classes, side),
                    chunks=(1, classes, side),
                    dtype="float32",
                    dimensions=("query_block", "query_class", "query"),
                )

    def open(self) -> Callable[[Tile], Result]:
        """Get the rows of both sides, multiply them layer by layer, and write the tile."""
        torch.set_num_threads(self.run.config.resources.threads)
        return _TileWork(self.run, _MadeRows(self.run) if self.fused else _StoredRows(self.run))


class _TileWork:
    """Makes tiles, and remembers between them how much may be expanded at a time."""

    def __init__(self, run: Run, rows: "_Rows") -> None:
        self._run, self._rows = run, rows
        self._values = EXPANDED_VALUES[rows.device.type]

    def __call__(self, key: Tile) -> Result:
        query: Block = (key.epoch, key.query_set, key.query_block)
        train: Block = (key.epoch, "train", key.train_block)
        layout, left, right = self._rows.sides(query, train)
        precision = self._run.config.gradients.precision
        (kernel, norm2), self._values = fitting_kernel(layout, left, right, precision, self._values)
        store, side = self._run.store, self._run.config.influence.tile_slices
        path, block = tiles_path(key.epoch, key.query_set), slice(key.query_block, key.query_block + 1)
        other = slice(key.train_block, key.train_block + 1)
        padded = _padded(kernel.cpu().numpy(), side, axes=(1, 3))[None, None]
        store.write(path, (block, other), padded)
        if key.train_block == (key.query_block if key.query_set == "train" else 0):
            norms = _padded(norm2.cpu().numpy(), side, axes=(1,))[None]
            store.write(f"{path}_norm2", (block,), norms)
        return {}


def fitting_kernel(
    layout: Layout, query: SegmentReader, train: SegmentReader | None, precision: Precision, values: int
) -> tuple[tuple[Tensor, Tensor], int]:
    """What `tile_kernel` returns, and how many values could be expanded at a time: as many, or what memory allows."""
    return halving(
        lambda fewer: tile_kernel(layout, query, train, chunk_values=fewer, precision=precision),
        values,
        LEAST_EXPANDED_VALUES,
    )


class _StoredRows:
    """The rows of blocks from the gradient shards."""

    def __init__(self, run: Run) -> None:
        self.device = pick_device(run)
        self._run = run

    def sides(self, query: Block, train: Block) -> tuple[Layout, SegmentReader, SegmentReader | None]:
        """What rows are, and how those of the query's and of the train block are read; None where they are the same."""
        layout = stored_layout(self._run, query[0])
        return layout, self._reader(query, layout), None if query == train else self._reader(train, layout)

    def _reader(self, block: Block, layout: Layout) -> SegmentReader:
        epoch, query_set, number = block
        return ShardReader(self._run, epoch, query_set, blocks(self._run, query_set)[number], layout, self.device)


class _MadeRows:
    """The rows of blocks from the network: those of the last two blocks are held."""

    def __init__(self, run: Run) -> None:
        self._make = ShardDifferentiator(run)
        self.device = self._make.device
        self._run = run
        self._form = row_format(run)
        self._held: dict[Block, Tensor] = {}

    def sides(self, query: Block, train: Block) -> tuple[Layout, SegmentReader, SegmentReader | None]:
        """As of `_StoredRows`."""
        # What this tile doesn't need goes before what it needs is made.
        self._held = {block: rows for block, rows in self._held.items() if block in (query, train)}
        for block in (query, train):
            if block not in self._held:
                self._held[block] = self._rows(block)
        left, right = (partial(self._form.read, self._held[block]) for block in (query, train))
        return self._form.layout, left, None if query == train else right

    def _rows(self, block: Block) -> Tensor:
        epoch, query_set, number = block
        start, stop = blocks(self._run, query_set)[number]
        rows = self._form.room(stop - start, self.device)
        count, size = len(self._run.query_slices(query_set)), self._run.config.gradients.shard_slices
        for first, last in ranges(count, size):
            low, high = max(first, start), min(last, stop)
            if low < high:
                # Whole shards, as if they were stored: a shard across two blocks is made for both.
                values, _ = self._make(GradientShard(epoch, query_set, first, last))
                rows[low - start : high - start] = values[low - first : high - first]
        return rows


_Rows = _StoredRows | _MadeRows


def stored_layout(run: Run, epoch: int) -> Layout:
    """What the values of a gradient shard are."""
    return Layout.from_json(run.store.attributes(f"{paths.GRADIENTS}/{checkpoint_name(epoch)}")["layout"])


class ShardReader:
    """A `SegmentReader` of stored rows.

    Reads the values of a layer after another, many layers at a time: a chunk on disk holds several small ones.
    """

    def __init__(
        self, run: Run, epoch: int, query_set: QuerySet, rows: tuple[int, int], layout: Layout, device: torch.device
    ) -> None:
        self._run, self._path = run, gradients_path(epoch, query_set)
        self._rows, self._device = slice(*rows), device
        self._form = RowFormat(layout, run.config.gradients.dtype)
        self._start, self._held = 0, torch.empty((rows[1] - rows[0], 0))

    def __call__(self, segment: Segment) -> Tensor:
        """The values of a layer, in the precision that they are kept in or in float32."""
        place = self._form.place(segment)
        if not (self._start <= place.start and place.stop <= self._start + self._held.shape[1]):
            stop = min(max(place.stop, place.start + READ_WORDS), self._form.words)
            block = self._run.store.read(self._path, (self._rows, slice(place.start, stop)))
            self._start, self._held = place.start, RowFormat.from_array(block)
        words = self._held[:, place.start - self._start : place.stop - self._start]
        return self._form.segment(words.to(self._device), segment)


def _padded(values: Array, side: int, axes: Sequence[int]) -> Array:
    widths = [(0, side - length if axis in axes else 0) for axis, length in enumerate(values.shape)]
    return np.pad(values, widths, constant_values=np.nan)
