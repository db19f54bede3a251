"""The nouns: frozen addresses of what is computed, and the words that every other module uses.

Glossary
--------
slice
    One 2D section of a patient's volume; its address is the row in ``slices.zarr``.
class
    A tissue label, mutually exclusive with the others; ``class_id`` runs from 1 to C, background 0 is never a class.
region
    (slice, class): the pixels of a slice that the network assigns to a class with confidence.
query
    A region (or slice) that is explained; *train* is one whose influence on it is measured.
query set
    ``train`` or ``test``: which slices are queries.
gradient shard
    The region gradients of a range of slices at one checkpoint; one shard of a Zarr array.
tile
    The block of the influence tensor that is one unit of work, of writing and of resuming.
stripe
    A range of query slices against all train regions: one chunk of a finished tensor.
stage, key, worker
    A step of a run; the address of one unit of its work; the process that does it.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

QuerySet = Literal["train", "test"]
Precision = Literal["float32", "tf32", "bfloat16"]
"""Of the operands of convolutions and products (`arithmetic`)."""
MOST_CLASSES = 255
"""What a label of one byte can tell apart from the background."""
RowDtype = Literal["float32", "bfloat16", "float16"]
"""In which packed rows are kept (`rounding`)."""
Split = Literal["train", "validation", "test"]

QUERY_SETS: tuple[QuerySet, ...] = get_args(QuerySet)


class UsageError(ValueError):
    """What was asked for by name is not there, or can't be had that way; on the command line, exit code 2."""


class ReadError(OSError):
    """A disk or a mount failed under a file: it may pass, and says nothing of what is in the file."""


def checkpoint_name(epoch: int) -> str:
    """The name of an epoch's checkpoint in every path and table, such as ``epoch_06``."""
    return f"epoch_{epoch:02d}"


@dataclass(frozen=True, order=True)
class CaseKey:
    """One examination of one patient: a folder of NIfTI files."""

    case: str

    def __str__(self) -> str:
        """The key as a path segment; characters that paths don't carry are replaced."""
        return re.sub(r"[^\w.-]", "_", self.case)


@dataclass(frozen=True, order=True)
class EpochKey:
    """One epoch of training."""

    epoch: int

    def __str__(self) -> str:
        return checkpoint_name(self.epoch)


@dataclass(frozen=True, order=True)
class SliceRange:
    """Rows ``start`` to ``stop`` (exclusive) of ``slices.zarr``."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start:06d}-{self.stop:06d}"


@dataclass(frozen=True, order=True)
class GradientShard:
    """Positions ``start`` to ``stop`` among the slices of a query set, at one checkpoint."""

    epoch: int
    query_set: QuerySet
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{checkpoint_name(self.epoch)}/{self.query_set}/{self.start:06d}-{self.stop:06d}"


@dataclass(frozen=True, order=True)
class Tile:
    """A block of query slices against a block of train slices, all class pairs, at one checkpoint.

    Blocks are numbered; block ``k`` holds positions ``k·tile_slices`` to ``(k+1)·tile_slices`` of its set.
    """

    epoch: int
    query_set: QuerySet
    query_block: int
    train_block: int

    def __str__(self) -> str:
        return f"{checkpoint_name(self.epoch)}/{self.query_set}/{self.query_block:04d}-{self.train_block:04d}"


@dataclass(frozen=True, order=True)
class Stripe:
    """Positions ``start`` to ``stop`` of a query set against every train region, summed over checkpoints."""

    query_set: QuerySet
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.query_set}/{self.start:06d}-{self.stop:06d}"


def ranges(length: int, size: int) -> list[tuple[int, int]]:
    """The half-open ranges of at most ``size`` that partition ``0 … length`` in order.

    >>> ranges(5, 2)
    [(0, 2), (2, 4), (4, 5)]
    """
    return [(start, min(start + size, length)) for start in range(0, length, size)]
