"""Region gradients of slices, packed into rows: one forward for all classes, a backward of the activations a class.

The one idea: autograd is never asked for the gradient of a parameter. While the network runs, every unit's input is
kept; while the score of a class is differentiated back through the activations, all slices at once, every unit's output
gradient is caught as it passes. The two determine the gradient of each slice, and whichever is smaller, they or it,
goes into the packed row at once.

It doesn't know checkpoints, files or what gradients are multiplied with.
"""

import math
import sys
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ray_tracin.arithmetic import shared_threads
from ray_tracin.correlation import Shape
from ray_tracin.layers import Layout, Segment, parameter_gradients, unit_gradients
from ray_tracin.localized import LocalBackward
from ray_tracin.recording import Call, hooked, recorded, trace
from ray_tracin.regions import region_pixels, region_scores
from ray_tracin.units import (
    Shapes,
    Unit,
    affine_gradients,
    find_units,
    flat_gradients,
    frozen_copy,
    plan_segments,
    selected_parameters,
    trainable,
    twin,
)
from ray_tracin.vocabulary import Precision, ranges

TOLERANCE = 1e-3
"""Relative difference from autograd above which a parameter counts as not covered; rounding is far below."""
NOISE = 1e-5
"""Share of a region's gradient norm by which any parameter may differ: those whose true gradient is 0 (a bias before an
instance normalisation) hold nothing but rounding."""
SHARES = 4
"""Shares of a batch that go through the network at the same time, at the most, where threads allow: two passes keep two
CPU cores busier than one whose small layers are split between them."""
PASS_BYTES = 200 << 20
"""Activations of the slices that go through the network together on a CPU, unless one has more. More at once are no
faster, and slower where single tensors outgrow what the C library keeps for the next (32 MiB): each is cleared anew."""


class NonFiniteGradientError(ValueError):
    """A gradient that is infinite or not a number: where in the batch, which class, which unit."""

    def __init__(self, position: int, class_id: int, unit: str) -> None:
        super().__init__(
            f"expected finite gradients, got an infinite or missing value for slice {position} of the batch, class "
            f"{class_id}, at unit {unit!r}: look at the weights of that unit and at the slice"
        )
        self.position = position
        """Of the slice in the batch."""
        self.class_id = class_id
        """From 1 to C."""
        self.unit = unit
        """Path of the module in the network."""


@dataclass(frozen=True)
class RegionGradients:
    """The gradients of the regions of a batch of slices, as a layout describes them."""

    values: Float[Tensor, "slice value"]
    """Packed rows; a region that doesn't exist has a gradient of 0."""
    scores: Float[Tensor, "slice class"]
    """What was differentiated; NaN where the region doesn't exist."""
    exists: Bool[Tensor, "slice class"]


class RegionDifferentiator:
    """Differentiates the region scores of slices in the parameters of one network.

    Works on a copy of the network in eval mode, on the device and in the precision of its parameters; the network that
    is passed in is left as it is. ``example`` is one slice of the size that will be differentiated; its values don't
    matter. Nothing is approximated, and no selected parameter is left out: what can't be covered is refused, here or
    by `check`, which proves the coverage on data.

    Raises:
        ValueError: the selection matches nothing; a parameter is tied between modules or used although its module is
            never called; a module mixes slices; the network doesn't give a logit map for the background and each class.
    """

    layout: Layout
    """What the values of a packed row are."""

    def __init__(
        self,
        model: nn.Module,
        *,
        head: str,
        parameters: str | Sequence[str] = "all",
        example: Float[Tensor, "modality *space"],
        classes: int,
        precision: Precision = "float32",
    ) -> None:
        self._precision: Precision = precision
        self._names = selected_parameters(model, head, parameters)
        self._model = frozen_copy(model)
        self._units = self._units_of(self._model)
        self._parameters = {name: value for unit in self._units.values() for name, value in unit.parameters.items()}
        self._like = next(iter(self._parameters.values()))
        self._image_shape = tuple(example.shape)
        self._overwritten: set[str] = set()
        self._probe(example.to(self._like).unsqueeze(0), classes)

    def _units_of(self, model: nn.Module) -> dict[str, Unit]:
        return {unit.name: unit for unit in find_units(model, self._names)}

    def _probe(self, image: Float[Tensor, "1 modality *space"], classes: int) -> None:
        units = list(self._units.values())
        with recorded():
            one, two = (trace(self._model, units, torch.cat([image] * count)) for count in (1, 2))
        _check_logits(one.logits, (1, classes + 1, *image.shape[2:]))
        # Where units don't hold slices along their first axis, a batch would mix them: one slice at a time then.
        self._batched = one.doubled_by(two)
        self._read = one.read
        uncalled = [name for unit in units if unit.name not in one.read for name in unit.parameters]
        self._refuse_used(uncalled, image)
        self.layout = Layout(
            classes, plan_segments(self._units, one.read, one.written, classes), tuple(uncalled), one.kept_bytes
        )

    def _refuse_used(self, names: Sequence[str], image: Float[Tensor, "1 modality *space"]) -> None:
        """A module that is never called may be idle, or its parameters are read by other code."""
        parameters = [self._parameters[name] for name in names]
        if not parameters:
            return
        with recorded(), trainable(parameters):
            total = self._model(image.clone()).sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else ()
        used = [name for name, gradient in zip(names, found, strict=False) if gradient is not None]
        if used:
            raise ValueError(
                f"the logits depend on {', '.join(used)}, but the modules that own these parameters are never called, "
                "so their gradients can't be followed. Call the modules instead of using their parameters, or exclude "
                "the parameters by gradients.parameters"
            )

    def differentiate(
        self,
        images: Float[Tensor, "slice modality *space"],
        labels: Integer[Tensor, "slice *space"],
        masks: Bool[Tensor, "slice class *space"],
    ) -> RegionGradients:
        """The gradients ``∇_θ D_j(z_j; θ)`` of the score of every region of a batch (section 3.3), in eval mode.

        Raises:
            NonFiniteGradientError: a gradient is infinite or not a number.
            ValueError: the slices aren't as large as the example, a label is no class, or the masks don't fit.
        """
        if images.shape[1:] != self._image_shape or not len(images):
            raise ValueError(
                f"expected slices of shape {self._image_shape} (modality, *space) like the example that the "
                f"differentiator was made for, at least one, got images of shape {tuple(images.shape)}: make a "
                "differentiator for this size"
            )
        with recorded(self._precision):
            batch = images.to(self._like), labels.to(self._like.device), masks.to(self._like.device)
            values = batch[0].new_empty((len(images), self.layout.values))
            scores = self._in_shares([*batch, values])
        result = RegionGradients(values, scores, ~scores.isnan())
        self._check_finite(result)
        return result

    def _in_shares(self, batch: Sequence[Tensor]) -> Float[Tensor, "slice class"]:
        """The scores of images, labels and masks; the rows go into the fourth tensor."""
        count = len(batch[0])
        # A replay changes parameters, which shares have in common.
        alone = self._like.device.type != "cpu" or any(segment.kind == "other" for segment in self.layout.segments)
        size = count if alone else -(-count // min(count, torch.get_num_threads(), SHARES))
        shares = [[tensor[start:stop] for tensor in batch] for start, stop in ranges(count, size)]
        if len(shares) == 1:
            return self._share(self._model, *batch)
        twins = [twin(self._model) for _ in shares]
        with shared_threads(len(shares)) as each:
            return torch.cat(each(self._share, twins, *zip(*shares, strict=True)))

    def _share(self, model: nn.Module, *batch: Tensor) -> Float[Tensor, "slice class"]:
        count = len(batch[0])
        together = min(count, _together(self.layout, self._like.device.type)) if self._batched else 1
        parts = [[tensor[start:stop] for tensor in batch] for start, stop in ranges(count, together)]
        return torch.cat([self._batch(model, *part) for part in parts])

    def _batch(
        self, model: nn.Module, images: Tensor, labels: Tensor, masks: Tensor, values: Tensor
    ) -> Float[Tensor, "slice class"]:
        units = self._units_of(model)
        while True:
            passes = _Passes(units, self.layout, self._read, self._overwritten, values.zero_())
            logits = passes.forward(model, images)
            # Cloned, because autograd keeps them and refuses tensors of inference mode.
            scores = region_scores(logits, labels.clone(), masks.clone())
            passes.backward(torch.where(scores.isnan(), 0, scores))
            if not passes.overwritten:
                return scores.detach()
            # The network writes into what these units have read: once more, and from now on, with copies.
            self._overwritten |= passes.overwritten

    def _check_finite(self, result: RegionGradients) -> None:
        # One value that isn't finite makes the sum so, and a sum needs no room. Regions that don't exist hide nothing:
        # their upstream gradient is 0, and 0 times such a value is not a number.
        if result.values.sum().isfinite():
            return
        suspects = [unit.name for unit in self._units.values() if not _finite_state(unit.module)]
        # Backward, what is broken spreads from the logits to the image: the last unit is the nearest to the cause.
        for segment in reversed(self.layout.segments):
            bad = ~result.values[:, segment.offset : segment.stop].isfinite()
            inputs, gradients = bad.split([segment.input_values, segment.length - segment.input_values], dim=1)
            broken = gradients.unflatten(1, (self.layout.classes, -1)).any(dim=2) | inputs.any(dim=1, keepdim=True)
            if broken.any():
                position, column = broken.nonzero()[0].tolist()
                raise NonFiniteGradientError(position, column + 1, *suspects[:1] or [segment.unit])

    def check(
        self,
        images: Float[Tensor, "slice modality *space"],
        labels: Integer[Tensor, "slice *space"],
        masks: Bool[Tensor, "slice class *space"],
    ) -> None:
        """Nothing, if the gradients of these slices are autograd's on each slice alone, parameter by parameter.

        Whole slices stand in for regions that don't exist, and a made-up slice rides along, so that an operation that
        mixes the slices of a batch shows. One slice proves the coverage; it costs a few passes of the network.

        Raises:
            ValueError: a parameter's gradients differ; the message names all of them and says what to do.
        """
        empty = (region_pixels(masks) == 0).view(*masks.shape[:2], *(1,) * (masks.dim() - 2))
        masks = masks | empty
        stranger = (1 - images[:1].flip(-1)) / 2
        batch = zip((images, labels, masks), (stranger, labels[:1], masks[:1]), strict=True)
        rows = self.differentiate(*(torch.cat(pair) for pair in batch)).values
        worst = dict.fromkeys(self._parameters, 0.0)
        for position in range(len(images)):
            one = slice(position, position + 1)
            plain = self._plain_gradients(images[one], labels[one], masks[one])
            for name, ratio in self._differences(rows[one], plain).items():
                worst[name] = max(worst[name], ratio)
        differing = [f"{name} (by {ratio:.1%})" for name, ratio in worst.items() if ratio > TOLERANCE]
        if differing:
            raise ValueError(
                f"the gradients of these parameters differ from autograd's: {', '.join(differing)}. A parameter is "
                "covered where only its own module uses it, on one slice at a time; these are used elsewhere too, or "
                "their slices are mixed. Exclude them by gradients.parameters, freeze them (requires_grad_(False)), or "
                "call the module that owns them"
            )

    def _plain_gradients(self, image: Tensor, labels: Tensor, masks: Tensor) -> Float[Tensor, "class column"]:
        with recorded(), trainable(self._parameters.values()):
            logits = self._model(image.to(self._like).clone())
            scores = region_scores(logits, labels.to(logits.device).clone(), masks.to(logits.device).clone())[0]
            rows = [flat_gradients(score, self._parameters.values(), retain_graph=True) for score in scores]
        return torch.stack(rows)

    def _differences(self, row: Float[Tensor, "1 value"], plain: Float[Tensor, "class column"]) -> Mapping[str, float]:
        """For each parameter the difference relative to its own norm, or to the noise where that is larger."""
        noise = NOISE / TOLERANCE * plain.norm(dim=1)
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        expected = dict(zip(self._parameters, plain.split(sizes, dim=1), strict=True))
        got = {name: torch.zeros_like(values) for name, values in expected.items()}
        for segment in self.layout.segments:
            packed = row[:, segment.offset : segment.stop]
            got |= {k: v[0] for k, v in parameter_gradients(segment, packed, self.layout.classes).items()}
        return {
            name: _relative(got[name] - values, values.norm(dim=1).maximum(noise)) for name, values in expected.items()
        }


def differentiate_bytes(layout: Layout, slices: int, *, threads: int = 1, device: str = "cpu") -> int:
    """About how many bytes it takes to differentiate a batch of slices, the network's weights left out.

    Packed rows; and for the slices that are in the network at the same time, on so many CPU threads, what the backward
    pass keeps, the units' inputs, and twice the largest factors, on their way.
    """
    passes = min(threads, SHARES) if device == "cpu" else 1
    inside = min(slices, passes * _together(layout, device))
    widest = max((math.prod(s.input_shape) + math.prod(s.output_shape) for s in layout.segments), default=0)
    inputs = sum(math.prod(s.input_shape) for s in layout.segments if s.form == "gradient")
    return 4 * (slices * layout.values + inside * (inputs + 2 * widest)) + inside * layout.activation_bytes


def _together(layout: Layout, device: str) -> int:
    """Slices that may go through the network together."""
    return max(1, PASS_BYTES // max(1, layout.activation_bytes)) if device == "cpu" else sys.maxsize


class _Passes:
    """One forward pass of a batch, the backward passes of its classes, and the rows that they fill."""

    def __init__(
        self,
        units: Mapping[str, Unit],
        layout: Layout,
        read: Mapping[str, Sequence[Shapes]],
        copied: Set[str],
        values: Float[Tensor, "slice value"],
    ) -> None:
        self._values = values
        self.overwritten: set[str] = set()
        """Units whose inputs the network wrote into before they were used."""
        self._units = units
        self._classes = layout.classes
        self._segments = {segment.unit: segment for segment in layout.segments}
        self._example_read = read
        self._copied = copied
        self._calls: dict[str, list[Call]] = {}
        self._to_replay: list[tuple[Call, int, int, Tensor]] = []
        self._class = 0
        # What doesn't depend on a unit before it depends on this: a backward pass to here reaches every unit, and
        # goes no further than the first of them.
        self._anchor = values.new_zeros((), requires_grad=True)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        # On a GPU batches beat boxes, which differ from slice to slice and have to be read back from it.
        local = LocalBackward() if images.device.type == "cpu" else nullcontext()
        with local, hooked(list(self._units.values()), self._keep_input, self._watch_output):
            logits: Tensor = model(images.clone())
        return logits

    def backward(self, scores: Float[Tensor, "slice class"]) -> None:
        for column in range(self._classes if scores.requires_grad else 0):
            self._class = column
            more = column + 1 < self._classes
            torch.autograd.grad(scores[:, column].sum(), self._anchor, retain_graph=more, allow_unused=True)
            # Not inside the backward pass: a replay is a backward pass of its own.
            for arrival in self._to_replay:
                self._replay(*arrival)
            self._to_replay.clear()

    def _keep_input(self, unit: Unit, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        segment = self._segments[unit.name]
        calls = self._calls.setdefault(unit.name, [])
        if len(calls) == len(self._example_read[unit.name]):
            raise ValueError(
                f"unit {unit.name!r} was called {len(calls)} times on the example and more often on this batch: the "
                "number of calls must not depend on the slices"
            )
        call = Call.of(unit, arguments, keywords, copied=unit.name in self._copied)
        if segment.form == "factors":
            inputs = call.tensors[0].reshape(len(self._values), -1)
            self._values[:, segment.offset : segment.offset + inputs.shape[1]] = inputs
            call = Call.of(unit, (), {})
        calls.append(call)

    def _watch_output(self, unit: Unit, output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        number = len(self._calls[unit.name]) - 1
        return tree_unflatten(
            [self._watched(leaf, unit, number, place) for place, leaf in enumerate(leaves)], structure
        )

    def _watched(self, leaf: Any, unit: Unit, number: int, place: int) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        tied = leaf if leaf.requires_grad else leaf + self._anchor
        if tied.requires_grad:
            # A hook on the tensor, not on the module: it sees the gradient of what the unit wrote even where the
            # network goes on to change that in place.
            tied.register_hook(partial(self._take, unit, number, place))
        return tied

    def _take(self, unit: Unit, number: int, place: int, output_gradient: Tensor) -> None:
        segment, call = self._segments[unit.name], self._calls[unit.name][number]
        if segment.form == "factors":
            self._add(segment, output_gradient.reshape(len(self._values), -1))
        elif call.overwritten():
            self.overwritten.add(unit.name)
        elif segment.kind == "other":
            self._to_replay.append((call, number, place, output_gradient))
        else:
            self._add(segment, _formula(segment, call, output_gradient, len(self._values)))

    def _replay(self, call: Call, number: int, place: int, output_gradient: Tensor) -> None:
        example = self._example_read[call.unit.name][number]
        slices = len(self._values)
        shared = [tuple(now.shape) == then for now, then in zip(call.tensors, example, strict=True)]
        self._add(self._segments[call.unit.name], call.replayed(place, output_gradient, slices, shared))

    def _add(self, segment: Segment, part: Float[Tensor, "slice part"]) -> None:
        start = segment.offset + segment.input_values + self._class * part.shape[1]
        self._values[:, start : start + part.shape[1]] += part


def _formula(segment: Segment, call: Call, output_gradient: Tensor, slices: int) -> Float[Tensor, "slice column"]:
    inputs = call.tensors[0]
    if segment.geometry is None:
        return affine_gradients(call.unit, inputs, output_gradient, slices)
    if segment.kind == "linear":
        inputs, output_gradient = (part.reshape(slices, -1, part.shape[-1]) for part in (inputs, output_gradient))
    return unit_gradients(segment, inputs, output_gradient)


def _relative(difference: Float[Tensor, "class column"], scale: Float[Tensor, " class"]) -> float:
    norm = difference.norm(dim=1)
    # Where autograd's gradient is 0 altogether, no difference is none and any is infinitely large.
    return float(torch.where(norm == 0, 0, norm / scale).max())


def _check_logits(logits: Any, expected: Shape) -> None:
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"expected logits of shape {expected} (slice, background and classes, *space) from the network for one "
            f"slice, got {got}: wrap it in a module that returns one logit map for the background and each class, as "
            "large as the image"
        )


def _finite_state(module: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in (*module.parameters(), *module.buffers()))
