"""From packed gradients to influence: tiles of the kernel, and the sum over checkpoints.

The one idea: the inner product of two gradients is a sum over units, so a tile goes through the network a unit at a
time: expand that unit's gradients once for all regions of both sides, multiply, add, drop them; or, where that is less
work, multiply their factors (`pairing`). No gradient is ever held whole.

It doesn't know networks, runs or files: rows come from two functions that read a unit's part of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from ray_tracin import pairing
from ray_tracin.arithmetic import Each, arithmetic, multiply, operands, shared_threads, wide
from ray_tracin.correlation import Chunk
from ray_tracin.layers import Layout, Segment, expand_bytes, expansion
from ray_tracin.pairing import Pairs, pair_bytes, pays
from ray_tracin.vocabulary import Precision, ranges

PANELS = 8
"""Row panels that the upper half of a symmetric kernel is cut into: they multiply 56 % of it."""
SMALLEST_PANEL = {"cpu": 96, "cuda": 1280}
"""Rows below which products lose speed, by device: fewer leave processors of a large GPU without work (counted)."""

ALIGNED_VALUES = 64
"""What parts of rows are multiples of, so that a GPU's loads of 16 bytes are aligned in every precision."""

EXPANDED_VALUES = {"cpu": 1 << 23, "cuda": 1 << 29}
"""Gradient values of a side to expand at a time, by device, where memory is not short; more is no faster on a CPU."""
LANES = 2
"""Parts of the chunks that a CPU's threads go through at the same time, at the most: a thread a product keeps two cores
busier than products that are split between them."""

SegmentReader = Callable[[Segment], Tensor]
"""Reads a segment's part of the packed rows of some slices: (slice, length), in the precision that they have."""


def tile_kernel(
    layout: Layout,
    query: SegmentReader,
    train: SegmentReader | None,
    *,
    chunk_values: int,
    precision: Precision = "float32",
) -> tuple[Float[Tensor, "class query class train"], Float[Tensor, "class query"]]:
    """The inner products of the gradients of query and train regions, and the squared norms of the query's.

    ``K[i, z', j, z] = ⟨∇D_j(z_j), ∇D_i(z'_i)⟩``, a term of eq. 6 without its learning rate, and ``|∇D_i(z'_i)|²``. With
    ``train`` None the two sides are the same slices: gradients are expanded once, the kernel is exactly symmetric and
    the norms are its diagonal. Products are float32, of operands of a precision, their sums over chunks and units
    float64, the results float32 (all float64 where the rows are). ``chunk_values`` bounds the gradient values that a
    side expands at a time.

    Raises:
        ValueError: the rows don't have the length that the layout says.
    """
    sums = _Sums(layout.classes, precision)
    with arithmetic(precision), shared_threads(LANES) as each:
        for segment in layout.segments:
            queries = query(segment)
            sums.add(segment, queries, queries if train is None else train(segment), chunk_values, each)
            # A layer of all slices can be much: it goes before the next one comes.
            del queries
    kernel, norm2 = sums.total()
    if train is None:
        kernel = kernel.triu() + kernel.triu(1).mT
        norm2 = kernel.diagonal()
    blocks = kernel.unflatten(1, (-1, layout.classes)).unflatten(0, (-1, layout.classes))
    return (
        blocks.permute(1, 0, 3, 2).to(sums.dtype).contiguous(),
        norm2.unflatten(0, (-1, layout.classes)).mT.to(sums.dtype),
    )


class _Sums:
    """A tile's sums over layers, a part of the chunks a lane: as many lanes on any threads.

    So the bits are the same as long as a lane has one thread; where it has more, they are as much the same as those of
    a product of matrices are, which depends on the CPU.
    """

    def __init__(self, classes: int, precision: Precision) -> None:
        self._classes, self._precision = classes, precision
        self._lanes: list[_Lane] = []
        self.dtype = torch.float32

    def add(self, segment: Segment, queries: Tensor, trains: Tensor, chunk_values: int, each: Each) -> None:
        """Adds the inner products of a segment's part of the rows of both sides, which may be the same."""
        count = LANES if queries.device.type == "cpu" else 1
        if not self._lanes:
            self.dtype = wide(queries.dtype)
            self._lanes = [_Lane.of(self._classes, queries, trains, self._precision) for _ in range(count)]
        if self._pairs(segment, queries):
            pairs = Pairs(segment, queries, trains, self._classes)
            lengths = len(trains), 0 if trains is queries else len(queries)
            parts = [ranges(length, pairing.TRAINS) for length in lengths]
            dealt = [[part[number::count] for number in range(count)] for part in parts]
            each(_Lane.add_pairs, self._lanes, [pairs] * count, *dealt)
            return
        chunks = _chunks(segment, self._classes, queries, trains, chunk_values // count)
        each(_Lane.add, self._lanes, [chunks[number::count] for number in range(count)])

    def _pairs(self, segment: Segment, rows: Tensor) -> bool:
        """Whether a segment's gradients are never made; where operands are rounded, those would be."""
        return self._precision != "bfloat16" and rows.device.type in pairing.DEVICES and pays(segment, self._classes)

    def total(self) -> tuple[Float64[Tensor, "row train_row"], Float64[Tensor, " row"]]:
        """The kernel, of symmetric ones the upper half and more; and the squared norms where the sides differ."""
        assert self._lanes, "a layout without segments has no gradients"
        first, *others = self._lanes
        for lane in others:
            first.kernel += lane.kernel
            first.norm2 += lane.norm2
        return first.kernel, first.norm2


@dataclass
class _Lane:
    """The sums over a part of the chunks."""

    kernel: Float64[Tensor, "row train_row"]
    norm2: Float64[Tensor, " row"]
    precision: Precision

    @classmethod
    def of(cls, classes: int, queries: Tensor, trains: Tensor, precision: Precision) -> "_Lane":
        rows, others = classes * len(queries), classes * len(trains)
        return cls(
            queries.new_zeros((rows, others), dtype=torch.float64),
            queries.new_zeros(rows, dtype=torch.float64),
            precision,
        )

    def add(self, chunks: Sequence[tuple[Chunk, Chunk]]) -> None:
        """Adds the inner products of both sides' columns, of a side with itself those on and above the diagonal."""
        for one, two in chunks:
            if one is two:
                self._add_upper(one().flatten(0, 1))
            else:
                self._add_pair(one().flatten(0, 1), two().flatten(0, 1))

    def add_pairs(self, pairs: Pairs, trains: Sequence[tuple[int, int]], queries: Sequence[tuple[int, int]]) -> None:
        """Adds the inner products with ranges of train slices, and the norms of ranges of query slices."""
        for start, stop in trains:
            part = pairs.columns(start, stop)
            self.kernel[: len(part), start * pairs.classes : stop * pairs.classes] += part
        for start, stop in queries:
            self.norm2[start * pairs.classes : stop * pairs.classes] += pairs.squares(start, stop)

    def _add_pair(self, left: Float[Tensor, "row column"], right: Float[Tensor, "train_row column"]) -> None:
        self.kernel += multiply(left, right, self.precision)
        self.norm2 += torch.linalg.vecdot(left, left)

    def _add_upper(self, rows: Float[Tensor, "row column"]) -> None:
        # Once, and not for every panel: a product would do it to parts of longer rows, and round them.
        rows = operands(rows.contiguous(), self.precision)
        # And some below the diagonal: the kernel is symmetric.
        least = SMALLEST_PANEL[rows.device.type]
        for start, stop in ranges(len(rows), max(least, -(-len(rows) // PANELS))):
            self.kernel[start:stop, start:] += multiply(rows[start:stop], rows[start:], self.precision)


def _chunks(
    segment: Segment, classes: int, queries: Tensor, trains: Tensor, chunk_values: int
) -> list[tuple[Chunk, Chunk]]:
    """Matching chunks of both sides' gradients, a row a region: the classes of a slice, then the next slice."""
    columns = max(1, chunk_values // (classes * max(len(queries), len(trains), 1)))
    # Products of parts that begin anywhere are slower.
    columns -= columns % ALIGNED_VALUES if columns > ALIGNED_VALUES else 0
    left = expansion(segment, queries, classes, columns=columns)
    right = left if trains is queries else expansion(segment, trains, classes, columns=columns)
    return list(zip(left, right, strict=True))


def tile_bytes(
    layout: Layout,
    query_slices: int,
    train_slices: int | None,
    *,
    chunk_values: int,
    stored_itemsize: int = 4,
    device: str = "cpu",
) -> int:
    """About how many bytes `tile_kernel` takes: rows as read and as float32, chunks, and the kernel's accumulator.

    ``train_slices`` is None where the sides are the same.
    """
    columns = max(1, chunk_values // (layout.classes * max(query_slices, train_slices or 0)))
    slices = query_slices + (train_slices or 0)
    lanes = LANES if device == "cpu" else 1
    read = slices * max((segment.length for segment in layout.segments), default=0) * (stored_itemsize + 4)
    expanded = expand_bytes(layout, slices, columns=columns, lanes=lanes, device=device)
    paired = [segment for segment in layout.segments if device in pairing.DEVICES and pays(segment, layout.classes)]
    expanded = max([expanded, *(pair_bytes(segment, slices, lanes) for segment in paired)])
    pairs = layout.classes**2 * query_slices * (train_slices or query_slices)
    # A sum and a term of every lane, the two halves of a symmetric kernel, and the whole.
    return read + expanded + pairs * (lanes * (8 + 4) + 8 + 8 + 8)


def without_absent(
    kernel: Float[Tensor, "class query class train"],
    query_exists: Bool[Tensor, "query class"],
    train_exists: Bool[Tensor, "train class"],
) -> Float[Tensor, "class query class train"]:
    """The kernel with NaN for every pair of which a region doesn't exist."""
    both = query_exists.mT[:, :, None, None] & train_exists.mT[None, None]
    return torch.where(both, kernel, torch.nan)


def train_columns(kernel: Float[Tensor, "class query class train"]) -> Float[Tensor, "class query column"]:
    """The kernel with one axis of train regions: (j, z) is column ``(j − 1) · n + position of z`` of n train slices.

    The kernel must hold all train slices.
    """
    return kernel.flatten(2)


def sum_checkpoints(
    kernels: Float[Tensor, "checkpoint class query column"], learning_rates: Float[Tensor, " checkpoint"]
) -> Float32[Tensor, "class query column"]:
    """The influence of eq. 6, ``T = Σ_t η_t K_t``; NaN where a region doesn't exist at some checkpoint.

    Summed in float64.
    """
    total = torch.zeros(kernels.shape[1:], dtype=torch.float64, device=kernels.device)
    for kernel, rate in zip(kernels, learning_rates.double().tolist(), strict=True):
        total.add_(kernel, alpha=rate)
    return total.float()
