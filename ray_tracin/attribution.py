"""The stage that takes gradients: packed rows of slices, made a shard at a time, and kept in ``gradients.zarr``.

``gradients.zarr`` (documented here, its owner) holds a group a checkpoint, ``epoch_NN``, with an array for each query
set: (slice, value), one Zarr shard a gradient shard, float32 or 16-bit words (as uint16; `rounding` says how they hold
the values, by the attribute ``logical_dtype``). A row holds everything needed for the region gradients of one slice,
all classes: the group's attribute ``layout`` says which values belong to which layer, and whether they are its
gradients or the factors that its gradients are products of. ``slices`` of each array lists the rows of ``slices.zarr``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from ray_tracin import store as paths
from ray_tracin.arithmetic import return_freed_memory
from ray_tracin.devices import pick_device
from ray_tracin.gradients import NonFiniteGradientError, RegionDifferentiator
from ray_tracin.mapping import mask_path
from ray_tracin.regions import whole_slices
from ray_tracin.rounding import RowFormat
from ray_tracin.runs import FINAL, Run
from ray_tracin.stages import Result, Stage, halving
from ray_tracin.unet import HEAD
from ray_tracin.vocabulary import GradientShard, QuerySet, checkpoint_name, ranges

INNER_CHUNK_WORDS = 1 << 15
"""Words of a slice in one inner chunk of a gradient shard."""


def gradients_path(epoch: int, query_set: QuerySet) -> str:
    """Where the gradient shards of a query set at a checkpoint are."""
    return f"{paths.GRADIENTS}/{checkpoint_name(epoch)}/{query_set}"


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
        form = row_format(run)
        for epoch in run.config.influence_epochs():
            run.store.create_group(f"{paths.GRADIENTS}/{checkpoint_name(epoch)}", {"layout": form.layout.to_json()})
            for name in needed_sets(run):
                rows = run.query_slices(name)
                run.store.create_array(
                    gradients_path(epoch, name),
                    shape=(len(rows), form.words),
                    shards=(settings.shard_slices, stored_words(form)),
                    chunks=(settings.shard_slices, min(INNER_CHUNK_WORDS, form.words)),
                    dtype=form.array_dtype,
                    dimensions=("slice", "value"),
                    attributes={"logical_dtype": settings.dtype, "slices": list(rows)},
                )

    def open(self) -> Callable[[GradientShard], Result]:
        """Differentiate the slices of a shard and write it."""
        return partial(_write_shard, self.run, ShardDifferentiator(self.run))


def stored_words(form: RowFormat) -> int:
    """Words that a row takes on disk: whole inner chunks."""
    inner = min(INNER_CHUNK_WORDS, form.words)
    return -(-form.words // inner) * inner


def _write_shard(run: Run, make: "ShardDifferentiator", key: GradientShard) -> dict[str, Any]:
    rows, regions = make(key)
    path = gradients_path(key.epoch, key.query_set)
    run.store.write(path, (slice(key.start, key.stop),), RowFormat.to_array(rows))
    return {"regions": regions}


def differentiator(run: Run, epoch: int, device: torch.device) -> RegionDifferentiator:
    """The engine on the network of a checkpoint."""
    size = run.config.data.size
    return RegionDifferentiator(
        run.model(epoch=epoch).to(device),
        head=HEAD,
        parameters=run.config.gradients.parameters,
        example=torch.zeros((len(run.modalities), size, size), device=device),
        classes=len(run.classes),
        precision=run.config.gradients.precision,
    )


def row_format(run: Run) -> RowFormat:
    """What the rows of a run are and how they are kept; the same at every checkpoint."""
    layout = differentiator(run, run.config.influence_epochs()[0], torch.device("cpu")).layout
    return RowFormat(layout, run.config.gradients.dtype)


class ShardDifferentiator:
    """Makes the rows of gradient shards, and keeps the network of the checkpoint at hand between them.

    A row is the same bits whoever makes it: the shard and the configuration fix which slices go through the network
    together, unless a GPU's memory is too small for so many.
    """

    def __init__(self, run: Run) -> None:
        torch.set_num_threads(run.config.resources.threads)
        self.device = pick_device(run)
        self._run = run
        self._epoch = -1
        self._step = run.config.resources.batch_slices

    def __call__(self, key: GradientShard) -> tuple[Shaped[Tensor, "slice word"], int]:
        """The packed rows of a shard, on the device and in the form of shards, and how many regions they have."""
        rows = self._run.query_slices(key.query_set)[key.start : key.stop]
        images, labels, masks = self._inputs(rows, key.epoch)
        self._open_checkpoint(key.epoch, images, labels, masks)
        kept = self._form.room(len(rows), self.device)
        start = 0
        while start < len(rows):
            batch = partial(self._batch, key, rows, kept, (images, labels, masks), start)
            done, self._step = halving(batch, self._step)
            start += done
        return_freed_memory()
        return kept, int(masks.flatten(2).any(2).sum())

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
        self._engine = differentiator(self._run, epoch, self.device)
        self._form = RowFormat(self._engine.layout, self._run.config.gradients.dtype)
        self._epoch = epoch
        # The proof that no parameter is left out costs one backward of one slice; the richest slice proves most.
        best = int(masks.flatten(2).any(2).sum(1).argmax())
        chosen = slice(best, best + 1)
        self._engine.check(*(part[chosen].to(self.device) for part in (images, labels, masks)))

    def _batch(
        self,
        key: GradientShard,
        rows: Sequence[int],
        kept: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        start: int,
        count: int,
    ) -> int:
        """Differentiates so many slices of a shard, or those that are left, and returns how many they were."""
        images, labels, masks = (part[start : start + count].to(self.device) for part in inputs)

        def receive(first: int, values: Tensor) -> None:
            self._form.write(kept, start + first, values)

        try:
            return len(self._engine.stream(images, labels, masks, receive))
        except NonFiniteGradientError as error:
            where = self._run.slices.set_index("slice").loc[rows[start + error.position]]
            raise ValueError(
                f"the gradient of {checkpoint_name(key.epoch)} is not finite: patient {where['patient']}, "
                f"slice {where['index']} (row {where.name}), class {self._run.classes[error.class_id - 1]}, "
                f"layer {error.unit}. Look at the checkpoint's loss in checkpoints.parquet and at the slice"
            ) from error


def _rows_of(run: Run, path: str, rows: Sequence[int]) -> Tensor:
    """Rows of an array, by one read of the range that spans them."""
    low, high = min(rows), max(rows) + 1
    block = run.store.read(path, (slice(low, high),))
    return torch.from_numpy(block[np.asarray(rows) - low])
