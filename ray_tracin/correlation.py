"""Correlations of what a layer read with what is asked of it: the gradients of convolutions, slice by slice.

With *points* ``p`` and *windows* ``w``, both of one slice and class, the gradient of a kernel is

    ∂D/∂W[a, b, k] = Σ_l p[a, l] · w[b, stride · l + dilation · k − padding]

A convolution's points are its output gradient and its windows its input; a transposed convolution's the reverse.

It doesn't know modules, parameters or rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ray_tracin import arithmetic
from ray_tracin.vocabulary import ranges

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""Start and stop, a spatial axis each."""

WINDOW_VALUES = {"cpu": 1 << 18, "cuda": 1 << 28}
"""Values of unfolded windows to hold at a time, by device: on a CPU what the cache of one core holds."""

BOXED_DEVICES = ("cpu",)
"""Devices on which work keeps to the boxes of slices that aren't zero. On a GPU batches beat boxes, which differ from
slice to slice: to read them back the device stops, and slices one by one keep it waiting for the next."""

LEAST_PRODUCT = 1 << 23
"""Multiplications of a slice's product from which on oneDNN, where it is the faster library, gets a call a slice.

A call costs as much as some millions of them, and smaller products go as a batch by PyTorch. For Zen 5, by its rates;
on Zen 4 batches are a tenth faster beyond it too."""

LEAST_WINDOWS = 144
"""Windows of a block below which a product of matrices loses speed."""

Chunk = Callable[[], Float[Tensor, "slice class column"]]
"""Makes some columns of region gradients, when and where they are needed."""

_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its windows, one entry a spatial axis."""

    kernel: Shape
    stride: Shape
    dilation: Shape
    padding: tuple[tuple[int, int], ...]
    """Zeros before and after."""
    groups: int = 1


POINTWISE = Geometry(kernel=(1,), stride=(1,), dilation=(1,), padding=((0, 0),))
"""A linear layer: its leading axes, flattened, are the positions of a kernel of one pixel."""


def each_axis(value: int | Sequence[int], axes: int) -> Shape:
    """What a convolution is told for its axes: each, or one for all of them."""
    told = (value,) if isinstance(value, int) else tuple(value)
    return told * axes if len(told) == 1 else told


def windows_of(geometry: Geometry, points: Box) -> Box:
    """The box of all that a box of points sees; where there is padding it reaches outside."""
    return tuple(
        (stride * start - before, stride * (stop - 1) + step * (size - 1) - before + 1)
        for (start, stop), size, stride, step, (before, _) in _axes(points, geometry)
    )


def points_of(geometry: Geometry, windows: Box, positions: Shape) -> Box | None:
    """The box of the points, out of so many, that see something of a box of windows; None if none does."""
    box = tuple(
        (max(0, -(-(start + before - step * (size - 1)) // stride)), min(count, (stop - 1 + before) // stride + 1))
        for ((start, stop), size, stride, step, (before, _)), count in zip(
            _axes(windows, geometry), positions, strict=True
        )
    )
    # A stride can be longer than a kernel reaches.
    return box if all(start < stop for start, stop in box) else None


def _axes(box: Box, geometry: Geometry) -> Iterator[tuple[Any, ...]]:
    return zip(box, geometry.kernel, geometry.stride, geometry.dilation, geometry.padding, strict=True)


def cut(values: Float[Tensor, "slice channel *space"], box: Box) -> Float[Tensor, "slice channel *box"]:
    """The values in a box; zeros where it reaches outside."""
    inside = clipped(box, values.shape[2:])
    if any(first == last for first, last in inside):
        return values.new_zeros((*values.shape[:2], *(stop - start for start, stop in box)))
    part = values[:, :, *slices(inside)]
    widths = [
        width
        for (start, stop), (first, last) in zip(reversed(box), reversed(inside), strict=True)
        for width in (first - start, stop - last)
    ]
    return F.pad(part, widths) if any(widths) else part


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index of the spatial axes."""
    return tuple(slice(start, stop) for start, stop in box)


def clipped(box: Box, space: Shape) -> Box:
    """The part of a box that is inside; empty, but inside, where none is."""
    return tuple(
        (min(max(start, 0), extent), min(max(stop, 0), extent))
        for (start, stop), extent in zip(box, space, strict=True)
    )


def nonzero_boxes(values: Float[Tensor, "slice channel *space"]) -> list[Box | None]:
    """For each slice the smallest box that holds all its values but zeros, of any channel; None if all are zero."""
    # Twice as fast as comparing all values with 0; whatever isn't a number counts as not 0. NumPy is faster on bytes.
    anywhere: npt.NDArray[np.bool_] = ((values.amax(dim=1) != 0) | (values.amin(dim=1) != 0)).cpu().numpy()
    axes = set(range(1, anywhere.ndim))
    lines = [np.logical_or.reduce(anywhere, axis=tuple(axes - {axis})) for axis in sorted(axes)]
    bounds = [zip(line.argmax(1).tolist(), _stops(line), strict=True) for line in lines]
    return [tuple(box) if line.any() else None for *box, line in zip(*bounds, lines[0], strict=True)]


def _stops(lines: npt.NDArray[np.bool_]) -> list[int]:
    """One past the last that is set, a line each."""
    stops: list[int] = (lines.shape[1] - lines[:, ::-1].argmax(1)).tolist()
    return stops


def correlate_boxes(
    geometry: Geometry,
    points: Float[Tensor, "slice pointed *positions"],
    windows: Float[Tensor, "slice windowed *space"],
    boxes: Sequence[Box | None],
) -> Float[Tensor, "slice column"]:
    """The gradients of a kernel, flattened, from the boxes of points outside of which nothing adds to it.

    PyTorch's own kernels, a slice at a time: where positions are many they beat unfolding, and need no room for it.
    """
    correlate = _WEIGHT_GRADIENTS[len(geometry.kernel)]
    shape = points.shape[1], windows.shape[1] // geometry.groups, *geometry.kernel
    rows = points.new_zeros(len(points), *shape)
    for position, box in enumerate(boxes):
        if box is not None:
            asked = cut(points[position : position + 1], box)
            seen = cut(windows[position : position + 1], windows_of(geometry, box))
            rows[position] = correlate(seen, shape, asked, geometry.stride, 0, geometry.dilation, geometry.groups)
    return rows.flatten(1)


def correlate_slices(
    geometry: Geometry,
    points: Float[Tensor, "slice pointed *positions"],
    windows: Float[Tensor, "slice windowed *space"],
) -> Float[Tensor, "slice column"]:
    """The gradients of a kernel, flattened, of whole slices, all of them at once.

    Windows are unfolded along all axes but the first, along which the steps of the kernel are views of the same memory:
    a third of the bytes for a kernel of three.
    """
    asked = points.unflatten(1, (geometry.groups, -1)).flatten(3)
    channels = windows.unsqueeze(1).unflatten(2, (geometry.groups, -1))
    rows = points.new_empty((*asked.shape[:3], channels.shape[3], *geometry.kernel))
    # As if the kernel had one step along the first axis, and stood on every line of it.
    flat = replace(geometry, kernel=(1, *geometry.kernel[1:]), stride=(1, *geometry.stride[1:]))
    height = windows.shape[2] + sum(geometry.padding[0])
    stride, reach = geometry.stride[0], geometry.stride[0] * (points.shape[2] - 1) + 1
    size = windows.shape[1] * math.prod(geometry.kernel[1:]) * math.prod(windows.shape[2:])
    for start, stop in ranges(len(windows), max(1, WINDOW_VALUES[windows.device.type] // size)):
        lines = _unfold(flat, channels[start:stop], (height, *points.shape[3:])).unflatten(4, (height, -1))
        for number in range(geometry.kernel[0]):
            line = geometry.dilation[0] * number
            seen = lines[:, 0, :, :, line : line + reach : stride].flatten(3).flatten(0, 1)
            place = rows[start:stop, :, :, :, number]
            place.copy_(torch.bmm(asked[start:stop].flatten(0, 1), seen.mT).view_as(place))
    return rows.flatten(1)


def correlate(
    geometry: Geometry,
    points: Float[Tensor, "slice pointed out *positions"],
    windows: Float[Tensor, "slice windowed in *space"],
    columns: int,
) -> list[Chunk]:
    """The gradients of a weight of shape (out, in/groups, *kernel), in blocks of ``in/groups`` and of ``out``.

    The axis of classes is on one side, the other side has one entry for all of them. A block has at most ``columns``
    columns, or those of one kernel a group if that is more.
    """
    positions = tuple(points.shape[3:])
    grouped = points.flatten(3).unflatten(2, (geometry.groups, -1))
    channels = windows.unflatten(2, (geometry.groups, -1))
    outs, ins = _block(geometry, grouped.shape[3], channels.shape[3], columns)
    return [
        partial(_correlate_block, geometry, grouped[:, :, :, slice(*out)], channels[:, :, :, slice(*seen)], positions)
        for seen in ranges(channels.shape[3], ins)
        for out in ranges(grouped.shape[3], outs)
    ]


def _block(geometry: Geometry, outs: int, ins: int, columns: int) -> tuple[int, int]:
    """How many of a group's outputs and inputs make a block of so many columns.

    All outputs, so that every window is unfolded once, unless too few windows are left for a fast product.
    """
    each = geometry.groups * math.prod(geometry.kernel)
    most = max(1, columns // each)
    width = min(ins, max(most // outs, min(most, -(-LEAST_WINDOWS // math.prod(geometry.kernel)))))
    return _even(outs, most // width), _even(ins, width)


def _even(count: int, most: int) -> int:
    """The length of parts of at most so many that differ least."""
    return -(-count // -(-count // most))


def _correlate_block(
    geometry: Geometry,
    points: Float[Tensor, "slice pointed group out position"],
    windows: Float[Tensor, "slice windowed group in *space"],
    positions: Shape,
) -> Float[Tensor, "slice class column"]:
    slices, pointed, groups, outs, _ = points.shape
    classes, seen_by_kernel = max(pointed, windows.shape[1]), windows.shape[3] * math.prod(geometry.kernel)
    block = points.new_empty((slices, classes, groups, outs, seen_by_kernel), dtype=arithmetic.wide(points.dtype))
    size = windows.shape[1] * groups * seen_by_kernel * math.prod(positions)
    plain = pointed == classes and groups == 1
    mixed = plain and points.dtype == torch.bfloat16 and points.device.type in arithmetic.MIXED_DEVICES
    large = pointed * outs * size >= LEAST_PRODUCT
    by_slice = large and groups == 1 and points.device.type == "cpu" and arithmetic.prefers_onednn()
    for start, stop in ranges(slices, max(1, WINDOW_VALUES[points.device.type] // size)):
        # Here, and not before, because all slices in float32 could be more than fits.
        asked, seen = (part[start:stop].to(points.dtype if mixed else block.dtype) for part in (points, windows))
        unfolded = _unfold(geometry, seen, positions)
        part = block[start:stop]
        if by_slice:
            places = part.view(len(part), pointed, -1, outs, seen_by_kernel)
            for place, left, right in zip(places, asked, unfolded, strict=True):
                product = arithmetic.inner_products(left.flatten(0, 2), right.flatten(0, 2))
                place.copy_(product.view(pointed, outs, -1, seen_by_kernel).transpose(1, 2))
        elif plain:
            # Written where it belongs, because new memory is slow.
            multiply = partial(torch.bmm, out_dtype=block.dtype) if mixed else torch.bmm
            multiply(asked.flatten(1, 3), unfolded[:, 0, 0].mT, out=part.flatten(1, 3))
        elif pointed == classes:
            part.copy_(torch.einsum("scgol,sgil->scgoi", asked, unfolded[:, 0]))
        else:
            part.copy_(torch.einsum("sgol,scgil->scgoi", asked[:, 0], unfolded))
    return block.flatten(2)


def _unfold(
    geometry: Geometry, values: Float[Tensor, "slice windowed group in *space"], positions: Shape
) -> Float[Tensor, "slice windowed group in_kernel position"]:
    """What each point of a kernel sees at each position."""
    padded = F.pad(values, [width for pair in reversed(geometry.padding) for width in pair])
    outer, inner = padded.stride()[:4], padded.stride()[4:]
    # Kernel and positions index the same axes: one strided view instead of an index a window.
    view = padded.as_strided(
        (*padded.shape[:4], *geometry.kernel, *positions),
        (*outer, *_scaled(inner, geometry.dilation), *_scaled(inner, geometry.stride)),
        padded.storage_offset(),
    )
    return view.reshape(*padded.shape[:3], -1, math.prod(positions))


def _scaled(strides: Shape, steps: Shape) -> Shape:
    return tuple(stride * step for stride, step in zip(strides, steps, strict=True))
