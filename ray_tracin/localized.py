"""A backward pass of the activations that stays where the score asks for something.

The one idea: the score of a region asks nothing of pixels outside it, so near the logits the gradients of activations
are zero but for a box around the region, which every convolution widens by its reach. A convolution of zeros is zero:
differentiating the box alone is exact, and in the full-resolution layers it is a fraction of the work.

It doesn't know units, scores or rows: whatever convolution PyTorch is asked for inside is made local.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ray_tracin.correlation import (
    Box,
    Geometry,
    Shape,
    clipped,
    cut,
    each_axis,
    nonzero_boxes,
    points_of,
    slices,
    windows_of,
)

LOCAL_POSITIONS = 12 * 12
"""Positions of a slice below which looking for boxes costs more than they save."""
LOCAL_SHARE = 0.7
"""Share of all positions above which boxes are not worth cutting out."""

SMALL_SLICE = 20480
"""Values of a slice up to which PyTorch may convolve one slice alone by another algorithm than many. A slice goes alone
then: rounding decides ReLUs and maxima that are all but tied, and must not depend on what else is in a batch."""

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


class LocalBackward(TorchFunctionMode):
    """Inside, convolutions with frozen weights differentiate their inputs in the boxes that aren't zero.

    Small slices are convolved alone; frozen batch normalisations become the scale and shift that they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What the function returns; a convolution's result knows how to go back locally."""
        if func is F.batch_norm:
            return _normalised(*args, **(kwargs or {}))
        local = None if kwargs else _localized(func, args)
        return func(*args, **(kwargs or {})) if local is None else _Convolution.apply(*local)  # type: ignore[no-untyped-call]


def _normalised(
    values: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """A batch normalisation; in eval mode as the scale and shift that it is, whose way back is one product."""
    learning = any(part is not None and part.requires_grad for part in (weight, bias))
    if training or learning or mean is None or variance is None:
        return F.batch_norm(values, mean, variance, weight, bias, training, momentum, eps)
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    channels = (-1, *(1,) * (values.dim() - 2))
    return torch.addcmul(shift.view(channels), values, scale.view(channels))


def _localized(func: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, ...] | None:
    """The arguments of a convolution, of both kinds alike; None if it isn't one in the form that modules call."""
    if func in _CONVOLUTIONS and len(args) == 7:
        values, weight, bias, stride, padding, dilation, groups = args
        extra = 0
    elif func in _TRANSPOSED and len(args) == 8:
        values, weight, bias, stride, padding, extra, groups, dilation = args
    else:
        return None
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)
    learning = weight.requires_grad or (bias is not None and bias.requires_grad)
    if isinstance(padding, str) or learning or math.prod(kernel) == 1 or values.dim() != weight.dim():
        return None
    pairs = tuple((width, width) for width in each_axis(padding, axes))
    geometry = Geometry(kernel, each_axis(stride, axes), each_axis(dilation, axes), pairs, groups)
    return values, weight, bias, geometry, func in _TRANSPOSED, each_axis(extra, axes)


class _Convolution(torch.autograd.Function):
    """A convolution, or a transposed one, of which only the input is differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        transposed: bool,
        extra: Shape,
    ) -> Tensor:
        ctx.call = (weight, geometry, transposed, extra, tuple(values.shape))
        moves = _moves(geometry, transposed, extra)
        if values[0].numel() > SMALL_SLICE:
            return torch.convolution(values, weight, bias, *moves)
        return torch.cat([torch.convolution(one, weight, bias, *moves) for one in values.split(1)])

    @staticmethod
    def backward(ctx: Any, output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, geometry, transposed, extra, shape = ctx.call
        boxes = _boxes(output_gradients)
        if boxes is None:
            moves = _moves(geometry, transposed, extra)
            return _input_gradients(output_gradients, weight, shape, *moves), *(None,) * 5
        result = output_gradients.new_zeros(shape)
        fill = _fill_transposed if transposed else _fill
        for one, part, box in zip(result.split(1), output_gradients.split(1), boxes, strict=True):
            if box is not None:
                fill(one, part, box, weight, geometry)
        return result, *(None,) * 5


def _boxes(values: Tensor) -> list[Box | None] | None:
    """The box of every slice, unless the boxes are most of the slices or these are small."""
    positions = math.prod(values.shape[2:])
    if positions < LOCAL_POSITIONS:
        return None
    boxes = nonzero_boxes(values)
    area = sum(math.prod(stop - start for start, stop in box) for box in boxes if box is not None)
    return boxes if area < LOCAL_SHARE * len(values) * positions else None


def _fill(result: Tensor, output_gradients: Tensor, box: Box, weight: Tensor, geometry: Geometry) -> None:
    """Writes what the box of a convolution's output gradient gives its input, for one slice."""
    reached = windows_of(geometry, box)
    inside = clipped(reached, result.shape[2:])
    shape = (1, result.shape[1], *(stop - start for start, stop in reached))
    moves = _moves(_bare(geometry), False, (0,) * len(box))
    part = _input_gradients(cut(output_gradients, box), weight, shape, *moves)
    kept = tuple((first - start, last - start) for (start, _), (first, last) in zip(reached, inside, strict=True))
    result[:, :, *slices(inside)] = part[:, :, *slices(kept)]


def _fill_transposed(result: Tensor, output_gradients: Tensor, box: Box, weight: Tensor, geometry: Geometry) -> None:
    """Writes what the box of a transposed convolution's output gradient gives its input, for one slice."""
    reached = points_of(geometry, box, result.shape[2:])
    if reached is None:
        return
    windows = cut(output_gradients, windows_of(geometry, reached))
    part = torch.convolution(windows, weight, None, *_moves(_bare(geometry), False, (0,) * len(box)))
    result[:, :, *slices(reached)] = part


def _bare(geometry: Geometry) -> Geometry:
    """The same without padding: boxes are cut out with the zeros that they reach into."""
    return replace(geometry, padding=((0, 0),) * len(geometry.kernel))


def _moves(geometry: Geometry, transposed: bool, extra: Shape) -> tuple[Any, ...]:
    padding = tuple(before for before, _ in geometry.padding)
    return geometry.stride, padding, geometry.dilation, transposed, extra, geometry.groups


def _input_gradients(output_gradients: Tensor, weight: Tensor, shape: Shape, *moves: Any) -> Tensor:
    # Only the shape of the input matters.
    unread = output_gradients.new_empty(shape)
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        output_gradients, unread, weight, None, *moves, [True, False, False]
    )
    return gradients[0]
