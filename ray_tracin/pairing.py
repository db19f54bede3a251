"""Inner products of gradients of convolutions from their factors, without the gradients.

The one idea: with the points ``p`` and windows ``w`` that make a gradient (`correlation`),

    ⟨∂D/∂W, ∂D'/∂W⟩ = Σ_{l, l'} (Σ_a p[a, l] · p'[a, l']) · (Σ_{b, k} w[b, l, k] · w'[b, l', k])

is a sum over pairs of positions instead of one over the entries of a kernel. Where positions are few (the deepest
layers, linear layers) these are far less work than the entries are. The second bracket is that of all classes, and its
sum over ``k`` costs additions alone, because windows overlap: what two slices have in common at a pair of pixels is
multiplied once. A bias is one more channel of the windows that is 1 everywhere.

It doesn't know modules, what rows are of, or how sums over layers are made.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ray_tracin.arithmetic import wide
from ray_tracin.correlation import WINDOW_VALUES, Geometry
from ray_tracin.layers import Segment, channels_first, unpacked
from ray_tracin.vocabulary import ranges

DEVICES = ("cpu",)
"""Devices on which it is known to pay: a GPU may be faster with the gradients, whose products are larger."""
LEAST_GAIN = 1.75
"""How many times fewer multiplications it must take: they are of smaller matrices, and slower (about so many times)."""
TRAINS = 4
"""Slices of the train side to take together; more are no faster."""
OVERLAP_VALUES = 1 << 20
"""Products of pixels to hold at a time."""


def pays(segment: Segment, classes: int) -> bool:
    """Whether pairs of positions take less than entries of the gradients, for every pair of slices."""
    geometry = segment.geometry
    if segment.form != "factors" or geometry is None or geometry.groups > 1 or not _has_weight(segment):
        return False
    if segment.kind == "transposed convolution":
        # Its windows are a class's own, so that the second bracket isn't that of all.
        return False
    (ins, *space), (outs, *positions) = segment.read, segment.written
    pixels, places = math.prod(space), math.prod(positions)
    paired = ins * pixels**2 + classes * outs * places**2 + classes**2 * outs * places
    return LEAST_GAIN * paired < classes**2 * segment.columns


def pair_bytes(segment: Segment, slices: int, lanes: int) -> int:
    """About how many bytes it takes beside the rows: the inputs in another order, and what a lane has on its way."""
    pixels = math.prod(segment.read[1:])
    overlaps = max(OVERLAP_VALUES, TRAINS * pixels**2)
    # Of pixels, summed along an axis, of positions, in another order; and the points' products.
    return 4 * (slices * segment.input_values + lanes * (4 * overlaps + WINDOW_VALUES["cpu"]))


class Pairs:
    """The inner products of a unit's gradients, of slices of a query side and a train side, which may be the same."""

    def __init__(
        self,
        segment: Segment,
        queries: Float[Tensor, "slice length"],
        trains: Float[Tensor, "train_slice length"],
        classes: int,
    ) -> None:
        assert segment.geometry is not None, f"{segment.unit} has no geometry"
        self._geometry: Geometry = segment.geometry
        self.classes, self._same = classes, trains is queries
        self._space, self._positions = segment.read[1:], segment.written[1:]
        self._constant = 1 if any(name.endswith("bias") for name in segment.parameters) else 0
        read, self._points = _sides(segment, queries, classes)
        self._train_read, self._train_points = (read, self._points) if self._same else _sides(segment, trains, classes)
        # Slices last, so that windows are added along many values at once.
        self._read = read.permute(1, 2, 0).contiguous()

    def columns(self, start: int, stop: int) -> Float[Tensor, "row train_row"]:
        """The inner products of the query slices with a range of train slices, a row a region.

        Where both sides are the same, of those up to the last of the range: on and above the diagonal, and a few below.
        """
        count = stop if self._same else len(self._points)
        block = self._points.new_empty((count, self.classes, stop - start, self.classes))
        for first, last in ranges(count, max(1, OVERLAP_VALUES // (TRAINS * math.prod(self._space) ** 2))):
            pixels = self._train_read[start:stop].mT.flatten(0, 1) @ self._read[:, :, first:last].flatten(1)
            for number, overlaps in enumerate(self._overlaps(pixels, last - first)):
                asked = self._train_points[start + number].reshape(self.classes, -1)
                for low, high, products in self._weighed(first, overlaps):
                    block[first + low : first + high, :, number] = products @ asked.mT
        return block.flatten(2).flatten(0, 1)

    def squares(self, start: int, stop: int) -> Float[Tensor, " row"]:
        """The squared norms of the gradients of a range of query slices, a row a region."""
        read = self._read[:, :, start:stop].permute(2, 1, 0)
        pixels = torch.bmm(read, read.mT).permute(1, 2, 0).flatten(1)
        (overlaps,) = self._overlaps(pixels, stop - start)
        norms = self._points.new_empty((stop - start, self.classes))
        for low, high, products in self._weighed(start, overlaps):
            own = self._points[start + low : start + high].unflatten(1, (self.classes, -1)).flatten(2)
            norms[low:high] = torch.linalg.vecdot(products, own)
        return norms.flatten()

    def _overlaps(
        self, pixels: Float[Tensor, "train_pixel column"], count: int
    ) -> Float[Tensor, "train query position train_position"]:
        """The second bracket, of the products of pixels: rows are train slices', columns so many query slices'."""
        axes = len(self._space)
        summed = pixels.view(-1, *self._space, *self._space, count)
        for axis in range(axes):
            summed = self._summed(summed, axis, (1 + axis, 1 + axes + axis))
        if self._constant:
            summed += self._constant
        places = math.prod(self._positions)
        return summed.reshape(-1, places, places, count).permute(0, 3, 2, 1).contiguous()

    def _summed(self, values: Tensor, axis: int, both: tuple[int, int]) -> Tensor:
        """Summed over what windows see along one axis of space, of both slices, where it isn't padding."""
        geometry, extent, places = self._geometry, self._space[axis], self._positions[axis]
        stride, before = geometry.stride[axis], geometry.padding[axis][0]
        shape = list(values.shape)
        shape[both[0]] = shape[both[1]] = places
        summed = values.new_zeros(shape)
        for step in range(geometry.kernel[axis]):
            shift = geometry.dilation[axis] * step - before
            low, high = max(0, (stride - 1 - shift) // stride), min(places, (extent - 1 - shift) // stride + 1)
            if low < high:
                seen = slice(stride * low + shift, stride * (high - 1) + shift + 1, stride)
                summed[_along(both, slice(low, high))] += values[_along(both, seen)]
        return summed

    def _weighed(
        self, start: int, overlaps: Float[Tensor, "query position train_position"]
    ) -> Iterator[tuple[int, int, Float[Tensor, "query class point"]]]:
        """The points of queries from some slice on, multiplied with overlaps, few at a time, and which these are."""
        for low, high in ranges(len(overlaps), max(1, WINDOW_VALUES["cpu"] // self._points[0].numel())):
            products = torch.bmm(self._points[start + low : start + high], overlaps[low:high])
            yield low, high, products.view(high - low, self.classes, -1)


def _sides(
    segment: Segment, packed: Float[Tensor, "slice length"], classes: int
) -> tuple[Float[Tensor, "slice in pixel"], Float[Tensor, "slice point position"]]:
    """What slices read, and what is asked of all classes' outputs."""
    inputs, asked = channels_first(segment, *unpacked(segment, packed.to(wide(packed.dtype)), classes))
    return inputs.flatten(2), asked.flatten(3).flatten(1, 2)


def _along(axes: tuple[int, int], part: slice) -> tuple[slice, ...]:
    """An index that takes a part of two axes."""
    return tuple(part if axis in axes else slice(None) for axis in range(max(axes) + 1))


def _has_weight(segment: Segment) -> bool:
    return any(name.endswith("weight") for name in segment.parameters)
