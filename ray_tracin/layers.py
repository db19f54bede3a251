"""How gradients are packed into rows, and how they are unpacked: segments, the layout, and their expansion.

The one idea: the gradient of a convolution's weight is a correlation of what the layer read (its input) with what
the score asks of it (its output gradient). In deep layers those two *factors* are far smaller than the gradient, so a
packed row keeps them, once the input for all classes, and the gradient is expanded only when it is multiplied with
others. Where the gradient is the smaller one, the row holds the gradient. Either way nothing is approximated.

Correlations (`correlation`) cover convolutions and transposed convolutions of any dimension and, with a kernel of one
pixel, linear layers.

Layouts are plain data: who holds a layout can expand rows without the network. It doesn't know how rows are made,
where they are stored, or what they are multiplied with.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ray_tracin import correlation
from ray_tracin.arithmetic import wide
from ray_tracin.correlation import (
    Chunk,
    Geometry,
    Shape,
    correlate,
    correlate_boxes,
    correlate_slices,
    nonzero_boxes,
    points_of,
)
from ray_tracin.vocabulary import ranges

Kind = Literal["convolution", "transposed convolution", "linear", "affine", "other"]
"""What a unit is; ``affine`` scales and shifts (normalisations, PReLU), ``other`` is differentiated by running it."""

Form = Literal["factors", "gradient"]


@dataclass(frozen=True)
class Segment:
    """The part of a packed row that belongs to one unit (a module with parameters of its own).

    A segment of *factors* holds the unit's input and then its output gradients, a class after the other; one of the
    *gradient* form holds the gradients of its parameters, a class after the other.
    """

    unit: str
    """Path of the module in the network."""
    kind: Kind
    form: Form
    parameters: tuple[str, ...]
    """Names in the network, in the order of the gradient's columns."""
    shapes: tuple[Shape, ...]
    """Of the parameters."""
    input_shape: Shape
    """Of one slice, as ``output_shape``: what the unit reads and writes; empty for ``other``."""
    output_shape: Shape
    geometry: Geometry | None
    """Of convolutions, transposed convolutions and linear layers."""
    offset: int
    length: int
    """Where the segment starts in a row, and how many values it has."""

    @property
    def columns(self) -> int:
        """Values of the gradient of one region: those of the unit's parameters."""
        return sum(self.sizes)

    @property
    def sizes(self) -> Shape:
        """Values of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def read(self) -> Shape:
        """What the unit reads of one slice, its channels first: a linear layer's leading axes are one of positions."""
        return self._channels_first(self.input_shape)

    @property
    def written(self) -> Shape:
        """What the unit writes, as ``read``."""
        return self._channels_first(self.output_shape)

    def _channels_first(self, shape: Shape) -> Shape:
        return (shape[-1], math.prod(shape[:-1])) if self.kind == "linear" else shape

    @property
    def input_values(self) -> int:
        """Values of the input that precedes the classes; 0 in the gradient form."""
        return math.prod(self.input_shape) if self.form == "factors" else 0

    @property
    def stop(self) -> int:
        """Where the segment ends in a row."""
        return self.offset + self.length


@dataclass(frozen=True)
class Layout:
    """What the values of a packed row are: all that is needed to expand stored rows."""

    classes: int
    segments: tuple[Segment, ...]
    """In the order of the forward pass; they partition the row."""
    unreached: tuple[str, ...] = ()
    """Parameters that the logits don't depend on: their gradients are 0 and take no room in a row."""
    activation_bytes: int = 0
    """Measured: what the forward pass of one slice keeps for the backward pass."""

    @cached_property
    def values(self) -> int:
        """Values of one packed row."""
        return sum(segment.length for segment in self.segments)

    @cached_property
    def columns(self) -> int:
        """Parameters that a gradient covers, those that the logits don't depend on left out."""
        return sum(segment.columns for segment in self.segments)

    def to_json(self) -> str:
        """The layout as text that `from_json` reads."""
        return _LAYOUTS.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> "Layout":
        """The layout that `to_json` wrote.

        Raises:
            ValueError: the text is no layout.
        """
        try:
            return _LAYOUTS.validate_json(text)
        except ValidationError as error:
            raise ValueError(f"expected the layout of packed gradients as JSON, got something else: {error}") from None


_LAYOUTS = TypeAdapter(Layout)


def factor_values(classes: int, input_shape: Shape, output_shape: Shape) -> int:
    """Values of a slice in the factors form: one input, and an output gradient a class."""
    return math.prod(input_shape) + classes * math.prod(output_shape)


def expand(
    segment: Segment, packed: Float[Tensor, "slice length"], classes: int, *, columns: int
) -> Iterator[Float[Tensor, "slice class column"]]:
    """The region gradients of a unit, in the chunks of `expansion`, one after the other."""
    return (chunk() for chunk in expansion(segment, packed, classes, columns=columns))


def expansion(segment: Segment, packed: Float[Tensor, "slice length"], classes: int, *, columns: int) -> list[Chunk]:
    """What makes the region gradients of a unit, in chunks of its columns that together hold each of them exactly once.

    ``packed`` is the segment's part of the rows, in any stored precision; chunks are float32, or float64 if it is. A
    chunk has at most ``columns`` columns, or those of one kernel a group of a weight if that is more. How columns are
    dealt to chunks depends on ``columns`` and the segment alone, so two expansions with the same ``columns`` can be
    multiplied chunk by chunk; with ``columns`` ≥ ``segment.columns`` they come in the order of the parameters.

    Raises:
        ValueError: the rows are not as long as the segment.
    """
    if segment.form == "gradient":
        _check_length(segment, packed)
        return _parts(packed.reshape(len(packed), classes, segment.columns), columns)
    return multiply_factors(segment, *unpacked(segment, packed, classes), columns=columns)


def unpacked(
    segment: Segment, packed: Float[Tensor, "slice length"], classes: int
) -> tuple[Float[Tensor, "slice *read"], Float[Tensor, "slice class *written"]]:
    """The unit's inputs and output gradients, of rows that hold its factors.

    Raises:
        ValueError: the rows are not as long as the segment.
    """
    _check_length(segment, packed)
    inputs, output_gradients = packed[:, : segment.input_values], packed[:, segment.input_values :]
    return (
        inputs.reshape(len(packed), *segment.input_shape),
        output_gradients.reshape(len(packed), classes, *segment.output_shape),
    )


def _check_length(segment: Segment, packed: Float[Tensor, "slice length"]) -> None:
    if packed.shape[1] != segment.length:
        raise ValueError(
            f"expected {segment.length} values a slice for unit {segment.unit!r}, got {packed.shape[1]}: read values "
            f"{segment.offset} to {segment.stop} of the rows that this layout describes"
        )


def channels_first(
    segment: Segment, inputs: Float[Tensor, "slice *read"], output_gradients: Float[Tensor, "slice class *written"]
) -> tuple[Float[Tensor, "slice in *space"], Float[Tensor, "slice class out *positions"]]:
    """The factors of a unit with the channels before the positions, which a linear layer has in one axis then."""
    if segment.kind != "linear":
        return inputs, output_gradients
    inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1]).mT
    return inputs, output_gradients.reshape(*output_gradients.shape[:2], -1, output_gradients.shape[-1]).mT


def parameter_gradients(
    segment: Segment, packed: Float[Tensor, "slice length"], classes: int
) -> dict[str, Float[Tensor, "slice class column"]]:
    """The region gradients of a unit by the name of the parameter, flattened."""
    whole = torch.cat(list(expand(segment, packed, classes, columns=segment.columns)), dim=2)
    return dict(zip(segment.parameters, whole.split(segment.sizes, dim=2), strict=True))


def multiply_factors(
    segment: Segment,
    inputs: Float[Tensor, "slice *read"],
    output_gradients: Float[Tensor, "slice class *written"],
    *,
    columns: int,
) -> list[Chunk]:
    """What makes the gradients of a unit from its factors, in chunks of columns as `expansion` gives them."""
    geometry = segment.geometry
    assert geometry is not None, f"{segment.unit} has no geometry"
    inputs, output_gradients = channels_first(segment, inputs, output_gradients)
    chunks: list[Chunk] = []
    for name in segment.parameters:
        if name.endswith("bias"):
            chunks += _parts(output_gradients.flatten(3).sum(3, dtype=wide(output_gradients.dtype)), columns)
        elif segment.kind == "transposed convolution":
            chunks += correlate(geometry, inputs.unsqueeze(1), output_gradients, columns)
        else:
            chunks += correlate(geometry, output_gradients, inputs.unsqueeze(1), columns)
    return chunks


def unit_gradients(
    segment: Segment, inputs: Float[Tensor, "slice *read"], output_gradients: Float[Tensor, "slice *written"]
) -> Float[Tensor, "slice column"]:
    """The gradients of a unit for one class: what `multiply_factors` gives, whole.

    Of the boxes of slices that aren't zero where the device is one for that, else of all slices at once.
    """
    geometry = segment.geometry
    assert geometry is not None, f"{segment.unit} has no geometry"
    if math.prod(geometry.kernel) == 1:
        chunks = multiply_factors(segment, inputs, output_gradients.unsqueeze(1), columns=segment.columns)
        return torch.cat([chunk() for chunk in chunks], dim=2)[:, 0]
    return torch.cat(
        [
            output_gradients.flatten(2).sum(2)
            if name.endswith("bias")
            else _weight_gradients(geometry, segment.kind, inputs, output_gradients)
            for name in segment.parameters
        ],
        dim=1,
    )


def _weight_gradients(
    geometry: Geometry,
    kind: Kind,
    inputs: Float[Tensor, "slice *read"],
    output_gradients: Float[Tensor, "slice *written"],
) -> Float[Tensor, "slice column"]:
    transposed = kind == "transposed convolution"
    points, windows = (inputs, output_gradients) if transposed else (output_gradients, inputs)
    if output_gradients.device.type not in correlation.BOXED_DEVICES:
        return correlate_slices(geometry, points, windows)
    boxes = nonzero_boxes(output_gradients)
    if transposed:
        boxes = [box and points_of(geometry, box, points.shape[2:]) for box in boxes]
    return correlate_boxes(geometry, points, windows, boxes)


def _parts(whole: Float[Tensor, "slice class column"], columns: int) -> list[Chunk]:
    return [partial(_part, whole, start, stop) for start, stop in ranges(whole.shape[2], columns)]


def _part(whole: Float[Tensor, "slice class column"], start: int, stop: int) -> Float[Tensor, "slice class part"]:
    return whole[:, :, start:stop].to(wide(whole.dtype))


def expand_bytes(layout: Layout, slices: int, *, columns: int, lanes: int = 1, device: str = "cpu") -> int:
    """About how many bytes it takes to expand chunks of the rows of some slices, beside the rows.

    Chunks of ``columns`` columns in all, or those of the widest segment if that is less, ``lanes`` of them at a time.
    """
    columns = min(columns, max((segment.columns for segment in layout.segments), default=0))
    narrowest = max((_smallest_chunk(segment) for segment in layout.segments), default=0)
    chunk = 2 * slices * layout.classes * max(columns, lanes * narrowest)
    return 4 * (chunk + lanes * _window_values(layout, device))


def _smallest_chunk(segment: Segment) -> int:
    if segment.form == "gradient" or segment.geometry is None:
        return 1
    return segment.geometry.groups * math.prod(segment.geometry.kernel)


def _window_values(layout: Layout, device: str) -> int:
    """Values of windows at a time: the budget, or all channels of one slice if that is more."""
    sizes = (_slice_windows(segment, layout.classes) for segment in layout.segments if segment.form == "factors")
    return max(correlation.WINDOW_VALUES[device], *sizes, 0)


def _slice_windows(segment: Segment, classes: int) -> int:
    assert segment.geometry is not None, f"{segment.unit} has factors but no geometry"
    kernel = math.prod(segment.geometry.kernel)
    if segment.kind == "transposed convolution":
        return classes * segment.output_shape[0] * kernel * math.prod(segment.input_shape[1:])
    return segment.input_shape[0] * kernel * math.prod(segment.output_shape[1:])
