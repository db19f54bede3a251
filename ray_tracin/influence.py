"""From packed gradients to influence: tiles of the kernel, the sum over checkpoints, and rankings of a row.

The one idea: the inner product of two gradients is a sum over units, so a tile goes through the network a unit at a
time: expand that unit's gradients once for all regions of both sides, multiply, add, drop them. No gradient is ever
held whole.

It doesn't know networks, runs or files: rows come from two functions that read a unit's part of them.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ray_tracin.arithmetic import arithmetic, multiply
from ray_tracin.layers import Layout, Segment, expand, expand_bytes
from ray_tracin.vocabulary import Precision, ranges

PANELS = 8
"""Row panels that the upper half of a symmetric kernel is cut into: they multiply 56 % of it."""
SMALLEST_PANEL = 96
"""Rows below which products lose speed."""

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
    kernel = norm2 = None
    with arithmetic(precision):
        for segment in layout.segments:
            queries = query(segment)
            trains = queries if train is None else train(segment)
            for left, right in _chunks(segment, layout.classes, queries, trains, chunk_values):
                if kernel is None or norm2 is None:
                    kernel = left.new_zeros((len(left), len(right)), dtype=torch.float64)
                    norm2 = left.new_zeros(len(left), dtype=torch.float64)
                if train is None:
                    _add_upper(kernel, left, precision)
                else:
                    kernel += multiply(left, right, precision)
                    norm2 += torch.linalg.vecdot(left, left)
    assert kernel is not None, "a layout without segments has no gradients"
    assert norm2 is not None
    dtype = torch.promote_types(left.dtype, torch.float32)
    if train is None:
        kernel = kernel.triu() + kernel.triu(1).mT
        norm2 = kernel.diagonal()
    blocks = kernel.unflatten(1, (-1, layout.classes)).unflatten(0, (-1, layout.classes))
    return blocks.permute(1, 0, 3, 2).to(dtype).contiguous(), norm2.unflatten(0, (-1, layout.classes)).mT.to(dtype)


def _add_upper(kernel: Float[Tensor, "row row"], rows: Float[Tensor, "row column"], precision: Precision) -> None:
    """Adds the inner products of rows on and above the diagonal, and some below it: the kernel is symmetric."""
    for start, stop in ranges(len(rows), max(SMALLEST_PANEL, -(-len(rows) // PANELS))):
        kernel[start:stop, start:] += multiply(rows[start:stop], rows[start:], precision)


def _chunks(
    segment: Segment, classes: int, queries: Tensor, trains: Tensor, chunk_values: int
) -> Iterator[tuple[Float[Tensor, "row column"], Float[Tensor, "train_row column"]]]:
    """Matching chunks of both sides' gradients, a row a region: the classes of a slice, then the next slice."""
    columns = max(1, chunk_values // (classes * max(len(queries), len(trains))))
    left = expand(segment, queries, classes, columns=columns)
    if trains is queries:
        return ((chunk.flatten(0, 1),) * 2 for chunk in left)
    right = expand(segment, trains, classes, columns=columns)
    return ((one.flatten(0, 1), two.flatten(0, 1)) for one, two in zip(left, right, strict=True))


def tile_bytes(
    layout: Layout, query_slices: int, train_slices: int | None, *, chunk_values: int, stored_itemsize: int = 4
) -> int:
    """About how many bytes `tile_kernel` takes: rows as read and as float32, chunks, and the kernel's accumulator.

    ``train_slices`` is None where the sides are the same.
    """
    columns = max(1, chunk_values // (layout.classes * max(query_slices, train_slices or 0)))
    expanded = expand_bytes(
        layout, query_slices + (train_slices or 0), columns=columns, stored_itemsize=stored_itemsize
    )
    pairs = layout.classes**2 * query_slices * (train_slices or query_slices)
    # The sum so far, a term in float32, the term in float64, and their sum.
    return expanded + pairs * (8 + 4 + 8 + 8)


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


def rank_influence(
    influence: Float[Tensor, " column"], k: int
) -> tuple[Int64[Tensor, " proponent"], Int64[Tensor, " opponent"]]:
    """The columns of the k largest values, largest first, and of the k smallest, smallest first.

    Regions that don't exist (NaN) are left out; of equal values the lower column comes first. Fewer than k if there are
    fewer. Not done: an opponent is among the smallest, whether or not its influence is below 0.
    """
    columns = (~influence.isnan()).nonzero()[:, 0]
    values = influence[columns]
    falling, rising = (torch.sort(values, descending=down, stable=True).indices[:k] for down in (True, False))
    return columns[falling], columns[rising]
