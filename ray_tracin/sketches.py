"""Sketches of region gradients: random projections, small enough to keep, whose inner products estimate the kernel.

The one idea: the gradient of a weight is a matrix ``G`` (its first axis, by all others), and its projection on both
sides, ``S_aᵀ G S_b``, can be had from the factors without ever making ``G``: project the points over channels,
correlate the windows with the columns of ``S_b`` as if they were kernels, multiply the two over positions. With
independent random signs in ``S_a`` and ``S_b``, scaled so that ``E[S Sᵀ] = 1``, the inner product of two sketches has
the inner product of the gradients as its expectation. An axis no longer than the sketch's size is kept as it is.

(Two-sided projections of gradient factors: LoGra, Choe et al. 2024, arXiv 2405.13954; there without activations in
space.) It doesn't know networks, runs or files.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ray_tracin.arithmetic import arithmetic
from ray_tracin.correlation import Shape
from ray_tracin.layers import Layout, Segment, parameter_gradients

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Sketcher:
    """Projects packed rows of a layout to sketches.

    Two sketches can be multiplied where layout, size and seed are the same. The projections of a parameter follow from
    seed and name alone, so that any process makes the same ones.
    """

    layout: Layout
    size: int
    """Values that an axis of a gradient is projected to; a weight gives up to ``size²`` values a region."""
    seed: str

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected a sketch size of at least 1, got {self.size}")

    @cached_property
    def values(self) -> int:
        """Values of the sketch of one region."""
        shapes = (shape for segment in self.layout.segments for shape in segment.shapes)
        return sum(math.prod(min(axis, self._limit(shape)) for axis in _matrix(shape)) for shape in shapes)

    def sketch(self, packed: Float[Tensor, "slice value"]) -> Float[Tensor, "slice class sketch"]:
        """The sketches of the regions of some slices, from their packed rows in any stored precision; float32.

        Raises:
            ValueError: the rows are not as long as the layout.
        """
        if packed.shape[1] != self.layout.values:
            raise ValueError(
                f"expected packed rows of {self.layout.values} values, as the layout says, got {packed.shape[1]}"
            )
        parts: list[Tensor] = []
        with arithmetic():
            for segment in self.layout.segments:
                part = packed[:, segment.offset : segment.stop].float()
                parts += self._of_factors(segment, part) if _has_factors(segment) else self._of_gradients(segment, part)
        return torch.cat([part.flatten(2) for part in parts], dim=2)

    def _of_gradients(self, segment: Segment, part: Tensor) -> Iterator[Float[Tensor, "slice class a b"]]:
        gradients = parameter_gradients(segment, part, self.layout.classes)
        for name, shape in zip(segment.parameters, segment.shapes, strict=True):
            matrix = gradients[name].unflatten(2, _matrix(shape))
            left, right = self._projections(name, shape, part.device)
            yield _times(_times(matrix, right).mT, left).mT

    def _of_factors(self, segment: Segment, part: Tensor) -> Iterator[Float[Tensor, "slice class a b"]]:
        inputs, output_gradients = _factors(segment, part, self.layout.classes)
        transposed = segment.kind == "transposed convolution"
        points, windows = (inputs, output_gradients) if transposed else (output_gradients, inputs)
        for name, shape in zip(segment.parameters, segment.shapes, strict=True):
            left, right = self._projections(name, shape, part.device)
            if name.endswith("bias"):
                yield _times(output_gradients.flatten(3).sum(3), left).unsqueeze(3)
            else:
                narrow = _times(points.flatten(3).mT, left)
                yield narrow.mT @ _correlated(segment, windows, right, shape, points.shape[3:]).mT

    def _projections(self, name: str, shape: Shape, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        left, right = (
            self._signs(f"{name}/{side}", axis, self._limit(shape)) for side, axis in enumerate(_matrix(shape))
        )
        return (None if left is None else left.to(device)), (None if right is None else right.to(device))

    def _limit(self, shape: Shape) -> int:
        # A vector has one axis for the room that a matrix has two for.
        return self.size**2 if len(shape) < 2 else self.size

    def _signs(self, name: str, axis: int, limit: int) -> Float[Tensor, "axis limit"] | None:
        """Random signs, scaled so that the expectation of their product with themselves is the identity."""
        if axis <= limit:
            return None
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        signs = torch.randint(0, 2, (axis, limit), generator=generator, dtype=torch.int8)
        scaled: Tensor = (2 * signs.float() - 1) / math.sqrt(limit)
        return scaled


def estimate_kernel(
    query: Float[Tensor, "query class sketch"], train: Float[Tensor, "train class sketch"]
) -> Float[Tensor, "class query class train"]:
    """The inner products of sketches, which estimate those of the gradients (a term of eq. 6) without bias."""
    products = query.flatten(0, 1) @ train.flatten(0, 1).mT
    blocks: Tensor = products.unflatten(1, (-1, train.shape[1])).unflatten(0, (-1, query.shape[1]))
    return blocks.permute(1, 0, 3, 2)


def _matrix(shape: Shape) -> tuple[int, int]:
    """The axes of a parameter as a matrix: the first, and all others together."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _has_factors(segment: Segment) -> bool:
    """Whether the sketch can be made from factors; where a kernel has groups, the gradient is expanded instead."""
    return segment.form == "factors" and segment.geometry is not None and segment.geometry.groups == 1


def _factors(segment: Segment, part: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Inputs (slice, 1, channel, *space) and output gradients (slice, class, channel, *space)."""
    split = segment.input_values
    inputs = part[:, :split].reshape(-1, 1, *segment.input_shape)
    output_gradients = part[:, split:].reshape(-1, classes, *segment.output_shape)
    if segment.kind == "linear":
        # Channels are last and any number of axes precede them: one axis of positions, after the channels.
        inputs = inputs.flatten(2, -2).mT if inputs.dim() > 3 else inputs.unsqueeze(3)
        output_gradients = (
            output_gradients.flatten(2, -2).mT if output_gradients.dim() > 3 else output_gradients[..., None]
        )
    return inputs, output_gradients


def _times(values: Tensor, projection: Tensor | None) -> Tensor:
    """The last axis projected; the values themselves where there is no projection."""
    return values if projection is None else values @ projection


def _correlated(
    segment: Segment,
    windows: Float[Tensor, "slice windowed channel *space"],
    projection: Float[Tensor, "column limit"] | None,
    shape: Shape,
    positions: Shape,
) -> Float[Tensor, "slice windowed limit position"]:
    """What each position's window has of each column of the projection: a convolution with the columns as kernels."""
    geometry = segment.geometry
    assert geometry is not None, f"{segment.unit} has no geometry"
    columns = math.prod(shape[1:])
    kernels = torch.eye(columns, device=windows.device) if projection is None else projection.mT
    padding = [width for pair in reversed(geometry.padding) for width in pair]
    padded = F.pad(windows.flatten(0, 1), padding)
    kernel_shape = (len(kernels), shape[1], *geometry.kernel)
    convolve = _CONVOLVE[len(geometry.kernel)]
    found: Tensor = convolve(padded, kernels.reshape(kernel_shape), stride=geometry.stride, dilation=geometry.dilation)
    # A transposed convolution may have written beyond the last window.
    for axis, length in enumerate(positions, start=2):
        found = found.narrow(axis, 0, length)
    flat: Tensor = found.flatten(2).unflatten(0, windows.shape[:2])
    return flat
