"""The stages that make the kernels: gradient shards, and the tiles that are their products.

``gradients.zarr`` (documented here, its owner) holds a group a checkpoint, ``epoch_NN``, with an array for each query
set: (slice, value), one Zarr shard a gradient shard, float32 or bfloat16 (as uint16, attribute ``logical_dtype``). A
row holds everything needed for the region gradients of one slice, all classes: the group's attribute ``layout`` says
which values belong to which layer, and whether they are its gradients or the factors that its gradients are products
of. ``slices`` of each array lists the rows of ``slices.zarr``.

``tiles.zarr`` holds the kernels as they are computed, blocks of slices against blocks of slices. Of the symmetric
train–train kernel only the blocks on and above the diagonal exist. `assembly` puts them into ``influence.zarr``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.gradients import NonFiniteGradientError, RegionDifferentiator
from ray_tracin.influence import tile_kernel
from ray_tracin.layers import Layout, Segment
from ray_tracin.mapping import mask_path
from ray_tracin.regions import whole_slices
from ray_tracin.runs import FINAL, Run, pick_device
from ray_tracin.stages import Result, Stage, halving
from ray_tracin.store import Array
from ray_tracin.unet import HEAD
from ray_tracin.vocabulary import GradientShard, QuerySet, Tile, checkpoint_name, ranges

INNER_CHUNK_VALUES = 1 << 15
"""Values of a slice in one inner chunk of a gradient shard."""
READ_VALUES = 1 << 17
"""Values of a slice that a tile worker reads at a time, if a layer doesn't have more."""
EXPANDED_VALUES = 1 << 22
"""Gradient values that a tile worker expands at a time, per side; more is no faster."""

LEAST_EXPANDED_VALUES = 1 << 16
"""The fewest that it expands at a time, where memory is short."""


def gradients_path(epoch: int, query_set: QuerySet) -> str:
    """Where the gradient shards of a query set at a checkpoint are."""
    return f"{paths.GRADIENTS}/{checkpoint_name(epoch)}/{query_set}"


def tiles_path(epoch: int, query_set: QuerySet) -> str:
    """Where the tiles of a query set at a checkpoint are."""
    return f"{paths.TILES}/{checkpoint_name(epoch)}/{query_set}"


def needed_sets(run: Run) -> tuple[QuerySet, ...]:
    """The sets whose gradients are needed: the train set always."""
    return ("train", *(name for name in run.query_sets if name != "train"))


def region_exists(run: Run, rows: Sequence[int], epoch: int) -> npt.NDArray[np.bool_]:
    """Which regions of the slices enter the tensor at a checkpoint: bool (slice, class)."""
    classes = len(run.classes)
    if run.config.gradients.score == "image":
        return np.ones((len(rows), classes), dtype=bool)
    own = run.config.regions.source == "checkpoint"
    column = f"pixels_{checkpoint_name(epoch)}" if own else "pixels"
    table = run.table("regions").pivot(index="slice", columns="class", values=column)
    return np.asarray(table.loc[list(rows), list(range(1, classes + 1))].to_numpy() > 0)


@dataclass(frozen=True)
class Differentiate(Stage[GradientShard]):
    """Compute the region gradients of the checkpoints, a shard a key."""

    epochs: tuple[int, ...]
    name: ClassVar[str] = "gradients"
    uses_gpu: ClassVar[bool] = True

    def keys(self) -> Sequence[GradientShard]:
        """Every shard of every epoch, train first."""
        size = self.run.config.gradients.shard_slices
        return [
            GradientShard(epoch, name, start, stop)
            for epoch in self.epochs
            for name in needed_sets(self.run)
            for start, stop in ranges(len(self.run.query_slices(name)), size)
        ]

    def write_layout(self) -> None:
        """Create the arrays of every influence checkpoint."""
        run, settings = self.run, self.run.config.gradients
        layout = differentiator(run, run.config.influence_epochs()[0], torch.device("cpu")).layout
        inner = min(INNER_CHUNK_VALUES, layout.values)
        for epoch in run.config.influence_epochs():
            run.store.create_group(f"{paths.GRADIENTS}/{checkpoint_name(epoch)}", {"layout": layout.to_json()})
            for name in needed_sets(run):
                rows = run.query_slices(name)
                run.store.create_array(
                    gradients_path(epoch, name),
                    shape=(len(rows), layout.values),
                    shards=(settings.shard_slices, -(-layout.values // inner) * inner),
                    chunks=(settings.shard_slices, inner),
                    dtype="float32" if settings.dtype == "float32" else "uint16",
                    dimensions=("slice", "value"),
                    attributes={"logical_dtype": settings.dtype, "slices": list(rows)},
                )

    def open(self) -> Callable[[GradientShard], Result]:
        """Differentiate the slices of a shard and write it."""
        return _GradientWork(self.run)


def differentiator(run: Run, epoch: int, device: torch.device) -> RegionDifferentiator:
    """The engine on the network of a checkpoint."""
    size = run.config.data.size
    return RegionDifferentiator(
        run.model(epoch=epoch).to(device),
        head=HEAD,
        parameters=run.config.gradients.parameters,
        example=torch.zeros((len(run.modalities), size, size), device=device),
        classes=len(run.classes),
    )


class _GradientWork:
    """Keeps the network of the checkpoint at hand between keys."""

    def __init__(self, run: Run) -> None:
        torch.set_num_threads(run.config.resources.threads)
        self._run = run
        self._device = pick_device(run)
        self._epoch = -1
        self._step = run.config.resources.batch_slices

    def __call__(self, key: GradientShard) -> Result:
        rows = self._run.query_slices(key.query_set)[key.start : key.stop]
        images, labels, masks = self._inputs(rows, key.epoch)
        self._open_checkpoint(key.epoch, images, labels, masks)
        parts, start = [], 0
        while start < len(rows):
            part, self._step = halving(partial(self._batch, key, rows, images, labels, masks, start), self._step)
            parts.append(part)
            start += len(part)
        values = stored(torch.cat(parts), self._run.config.gradients.dtype)
        whole = (slice(key.start, key.stop), slice(0, values.shape[1]))
        self._run.store.write(gradients_path(key.epoch, key.query_set), whole, values)
        return {"regions": int(masks.flatten(2).any(2).sum())}

    def _inputs(self, rows: Sequence[int], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        run = self._run
        own = run.config.regions.source == "checkpoint"
        masks = _rows_of(run, mask_path(checkpoint_name(epoch) if own else FINAL), rows)
        if run.config.gradients.score == "image":
            masks = whole_slices(masks)
        return torch.from_numpy(run.images(rows)), _rows_of(run, paths.REGION_LABELS, rows), masks

    def _open_checkpoint(self, epoch: int, images: Tensor, labels: Tensor, masks: Tensor) -> None:
        if epoch == self._epoch:
            return
        self._engine = differentiator(self._run, epoch, self._device)
        self._epoch = epoch
        # The proof that no parameter is left out costs one backward of one slice; the richest slice proves most.
        best = int(masks.flatten(2).any(2).sum(1).argmax())
        chosen = slice(best, best + 1)
        self._engine.check(*(part[chosen].to(self._device) for part in (images, labels, masks)))

    def _batch(
        self,
        key: GradientShard,
        rows: Sequence[int],
        images: Tensor,
        labels: Tensor,
        masks: Tensor,
        start: int,
        count: int,
    ) -> Tensor:
        batch = (part[start : start + count].to(self._device) for part in (images, labels, masks))
        try:
            return self._engine.differentiate(*batch).values.cpu()
        except NonFiniteGradientError as error:
            where = self._run.slices.set_index("slice").loc[rows[start + error.position]]
            raise ValueError(
                f"the gradient of {checkpoint_name(key.epoch)} is not finite: patient {where['patient']}, "
                f"slice {where['index']} (row {where.name}), class {self._run.classes[error.class_id - 1]}, "
                f"layer {error.unit}. Look at the checkpoint's loss in checkpoints.parquet and at the slice"
            ) from error


def stored(values: Tensor, dtype: str) -> Array:
    """Gradient values as they are stored: float32, or bfloat16 bits in uint16 (Zarr has no bfloat16)."""
    if dtype == "float32":
        return np.asarray(values.float().numpy())
    return np.asarray(values.to(torch.bfloat16).view(torch.uint16).numpy())


def restored(values: Array, dtype: str) -> Tensor:
    """The tensor that `stored` wrote, still in its stored precision."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor if dtype == "float32" else tensor.view(torch.bfloat16)


def _rows_of(run: Run, path: str, rows: Sequence[int]) -> Tensor:
    """Rows of an array, by one read of the range that spans them."""
    low, high = min(rows), max(rows) + 1
    shape = run.store.array(path).shape
    block = run.store.read(path, (slice(low, high), *(slice(0, length) for length in shape[1:])))
    return torch.from_numpy(block[np.asarray(rows) - low])


def blocks(run: Run, query_set: QuerySet) -> list[tuple[int, int]]:
    """The blocks of positions of a query set that tiles are made of."""
    return ranges(len(run.query_slices(query_set)), run.config.influence.tile_slices)


@dataclass(frozen=True)
class ComputeTiles(Stage[Tile]):
    """Multiply gradients with gradients: the kernels of the checkpoints, a tile a key."""

    epochs: tuple[int, ...]
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
        """Read the shards of both sides, layer by layer, and write the tile."""
        torch.set_num_threads(self.run.config.resources.threads)
        device = pick_device(self.run)
        return lambda key: _compute_tile(self.run, key, device)


def _compute_tile(run: Run, key: Tile, device: torch.device) -> dict[str, Any]:
    query_rows = blocks(run, key.query_set)[key.query_block]
    train_rows = blocks(run, "train")[key.train_block]
    layout = stored_layout(run, key.epoch)
    same = key.query_set == "train" and key.query_block == key.train_block
    query = _SegmentReader(run, key.epoch, key.query_set, query_rows, layout.values, device)
    train = None if same else _SegmentReader(run, key.epoch, "train", train_rows, layout.values, device)
    (kernel, norm2), _ = halving(
        lambda values: tile_kernel(layout, query, train, chunk_values=values), EXPANDED_VALUES, LEAST_EXPANDED_VALUES
    )
    side = run.config.influence.tile_slices
    path, block = tiles_path(key.epoch, key.query_set), slice(key.query_block, key.query_block + 1)
    other = slice(key.train_block, key.train_block + 1)
    padded = _padded(kernel.cpu().numpy(), side, axes=(1, 3))[None, None]
    run.store.write(path, (block, other, *(slice(0, length) for length in padded.shape[2:])), padded)
    if key.train_block == (key.query_block if key.query_set == "train" else 0):
        norms = _padded(norm2.cpu().numpy(), side, axes=(1,))[None]
        run.store.write(f"{path}_norm2", (block, *(slice(0, length) for length in norms.shape[1:])), norms)
    return {}


def stored_layout(run: Run, epoch: int) -> Layout:
    """What the values of a gradient shard are."""
    return Layout.from_json(run.store.attributes(f"{paths.GRADIENTS}/{checkpoint_name(epoch)}")["layout"])


class _SegmentReader:
    """Reads the values of a layer after another, many layers at a time: a chunk on disk holds several small ones."""

    def __init__(
        self, run: Run, epoch: int, query_set: QuerySet, rows: tuple[int, int], values: int, device: torch.device
    ) -> None:
        self._run, self._path = run, gradients_path(epoch, query_set)
        self._rows, self._values, self._device = slice(*rows), values, device
        self._start, self._held = 0, torch.empty((rows[1] - rows[0], 0))

    def __call__(self, segment: Segment) -> Tensor:
        if not (self._start <= segment.offset and segment.stop <= self._start + self._held.shape[1]):
            stop = min(max(segment.stop, segment.offset + READ_VALUES), self._values)
            block = self._run.store.read(self._path, (self._rows, slice(segment.offset, stop)))
            self._start, self._held = segment.offset, restored(block, self._run.config.gradients.dtype)
        return self._held[:, segment.offset - self._start : segment.stop - self._start].to(self._device)


def _padded(values: Array, side: int, axes: Sequence[int]) -> Array:
    widths = [(0, side - length if axis in axes else 0) for axis, length in enumerate(values.shape)]
    return np.pad(values, widths, constant_values=np.nan)
