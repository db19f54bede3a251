"""Region gradients of slices, packed into rows: one forward for all classes, a backward of the activations a class.

The one idea: autograd is never asked for the gradient of a parameter. While the network runs, every unit's input is
kept; while the score of a class is differentiated back through the activations, all slices at once, every unit's output
gradient is caught as it passes. The two determine the gradient of each slice, and whichever is smaller, they or it,
goes into the packed row at once.

It doesn't know checkpoints, files or what gradients are multiplied with.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from ray_tracin.arithmetic import shared_threads
from ray_tracin.correlation import WINDOW_VALUES, Shape
from ray_tracin.layers import Layout, parameter_gradients
from ray_tracin.passes import Passes
from ray_tracin.recording import recorded, trace
from ray_tracin.regions import region_pixels, region_scores
from ray_tracin.units import (
    Unit,
    deep_copy,
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
SMALLEST = 1e-2
"""Share of a region's gradient norm below which a parameter's counts as this: those whose true gradient is 0 (a bias
before an instance normalisation) hold nothing but rounding."""
SHARES = 4
"""Shares of a batch that go through the network at the same time, at the most, where threads allow: two passes keep two
CPU cores busier than one whose small layers are split between them."""
PASS_BYTES = 100 << 20
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

    @property
    def exists(self) -> Bool[Tensor, "slice class"]:
        """Which regions have a pixel."""
        return ~self.scores.isnan()


Receive = Callable[[int, Float[Tensor, "slice value"]], None]
"""Takes the packed rows of some slices, and the position of the first of them in the batch. The tensor is written again
afterwards, and calls come from several threads."""


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
        self._in_place = [name for name, module in model.named_modules() if getattr(module, "inplace", False) is True]
        with recorded():
            # Never called: what a module keeps of a call isn't in it.
            self._fresh = twin(self._model)
        # A hook may leave what it sees where another share would find it.
        self._hooked = any(one._forward_hooks or one._forward_pre_hooks for one in self._fresh.modules())
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
                "so their gradients can't be followed. Call the modules (not their forward) instead of using their "
                "parameters, or exclude the parameters by gradients.parameters"
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
            ValueError: the slices aren't as large as the example, a label is no class, labels or masks don't fit, or
                the network calls other modules for these slices than for the example, or checkpoints activations.
        """
        return self._differentiated(SHARES, self._precision, images, labels, masks)

    def _differentiated(self, shares: int, precision: Precision, *batch: Tensor) -> RegionGradients:
        with recorded():
            values = self._like.new_empty((len(batch[0]), self.layout.values))

        def receive(start: int, rows: Tensor) -> None:
            values[start : start + len(rows)] = rows

        return RegionGradients(values, self._streamed(shares, precision, receive, *batch))

    def stream(
        self,
        images: Float[Tensor, "slice modality *space"],
        labels: Integer[Tensor, "slice *space"],
        masks: Bool[Tensor, "slice class *space"],
        receive: Receive,
    ) -> Float[Tensor, "slice class"]:
        """As `differentiate`, but rows are handed over as soon as they are made, so that never all are in memory.

        Returns the scores.
        """
        return self._streamed(SHARES, self._precision, receive, images, labels, masks)

    def _streamed(
        self, shares: int, precision: Precision, receive: Receive, images: Tensor, labels: Tensor, masks: Tensor
    ) -> Float[Tensor, "slice class"]:
        if images.shape[1:] != self._image_shape or not len(images):
            raise ValueError(
                f"expected slices of shape {self._image_shape} (modality, *space) like the example that the "
                f"differentiator was made for, at least one, got images of shape {tuple(images.shape)}: make a "
                "differentiator for this size"
            )
        with recorded(precision):
            return self._in_shares(
                shares,
                receive,
                images.detach().to(self._like).contiguous(),
                labels.to(self._like.device),
                masks.to(self._like.device),
            )

    def _in_shares(self, shares: int, receive: Receive, *batch: Tensor) -> Float[Tensor, "slice class"]:
        """The scores of images, labels and masks, whose rows are received."""
        count = len(batch[0])
        # A replay changes parameters, which shares have in common.
        replayed = any(segment.kind == "other" for segment in self.layout.segments)
        alone = self._like.device.type != "cpu" or replayed or self._hooked
        size = count if alone else -(-count // min(count, torch.get_num_threads(), shares))
        bounds = list(ranges(count, size))
        twins = [twin(self._fresh) for _ in bounds[1:]]
        parts = [[tensor[start:stop] for tensor in batch] for start, stop in bounds]
        share = partial(self._share, receive)
        with shared_threads(len(bounds)) as each:
            firsts = [start for start, _ in bounds]
            return torch.cat(each(share, [self._model, *twins], firsts, *zip(*parts, strict=True)))

    def _share(self, receive: Receive, model: nn.Module, first: int, *batch: Tensor) -> Float[Tensor, "slice class"]:
        """The scores of a part of the batch that begins with some slice of it."""
        count = len(batch[0])
        together = min(count, _together(self.layout, self._like.device.type)) if self._batched else 1
        room = self._like.new_empty((together, self.layout.values))
        scores = []
        for start, stop in ranges(count, together):
            values = room[: stop - start]
            scores.append(self._batch(model, values, *(tensor[start:stop] for tensor in batch)))
            self._check_finite(first + start, values)
            receive(first + start, values)
        return torch.cat(scores)

    def _batch(
        self, model: nn.Module, values: Tensor, images: Tensor, labels: Tensor, masks: Tensor
    ) -> Float[Tensor, "slice class"]:
        units = self._units_of(model)
        while True:
            passes = Passes(units, self.layout, self._read, self._overwritten, values)
            logits = passes.forward(model, images)
            # Cloned, because autograd keeps them and refuses tensors of inference mode.
            scores = region_scores(logits, labels.clone(), masks.clone())
            with _no_checkpoints():
                passes.backward(torch.where(scores.isnan(), 0, scores))
            if not passes.overwritten:
                return scores.detach()
            # The network writes into what these units have read: once more, and from now on, with copies.
            self._overwritten |= passes.overwritten

    def _check_finite(self, start: int, values: Float[Tensor, "slice value"]) -> None:
        # One value that isn't finite makes the sum so, and a sum needs no room. Regions that don't exist hide nothing:
        # their upstream gradient is 0, and 0 times such a value is not a number.
        if values.sum().isfinite():
            return
        suspects = [unit.name for unit in self._units.values() if not _finite_state(unit.module)]
        # Backward, what is broken spreads from the logits to the image: the last unit is the nearest to the cause.
        for segment in reversed(self.layout.segments):
            bad = ~values[:, segment.offset : segment.stop].isfinite()
            inputs, gradients = bad.split([segment.input_values, segment.length - segment.input_values], dim=1)
            broken = gradients.unflatten(1, (self.layout.classes, -1)).any(dim=2) | inputs.any(dim=1, keepdim=True)
            if broken.any():
                position, column = broken.nonzero()[0].tolist()
                raise NonFiniteGradientError(start + position, column + 1, *suspects[:1] or [segment.unit])

    def check(
        self,
        images: Float[Tensor, "slice modality *space"],
        labels: Integer[Tensor, "slice *space"],
        masks: Bool[Tensor, "slice class *space"],
    ) -> None:
        """Nothing, if the gradients of these slices are autograd's on each slice alone, parameter by parameter.

        Whole slices stand in for regions that don't exist, and a made-up slice rides along, in the same share of the
        batch, so that an operation that mixes the slices of a batch shows. One slice proves the coverage; it costs a
        few passes of the network, in float32 products whatever the precision. Where they differ, float64 decides, as
        far as the network runs in it: rounding alone can turn a ReLU that is all but tied.

        Raises:
            ValueError: a parameter's gradients differ; the message names all of them and says what to do.
        """
        empty = (region_pixels(masks) == 0).view(*masks.shape[:2], *(1,) * (masks.dim() - 2))
        differing = self._differing(images, labels, masks | empty)
        if differing and self._like.dtype != torch.float64:
            try:
                differing = self._in_float64()._differing(images.double(), labels, masks | empty)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                pass  # A network that insists on its precision fails with PyTorch's own error.
        if differing:
            raise ValueError(
                f"the gradients of these parameters differ from autograd's: {', '.join(differing)}. A parameter is "
                "covered where only its own module uses it, on one slice at a time, and all comes out in the tensors "
                "that the module returns (also in tuples, lists and dictionaries); these are used elsewhere too, or "
                "their slices are mixed, or a module remembers earlier calls, or numbers are random, or "
                "torch.utils.checkpoint runs them again (switch it off). Exclude them by gradients.parameters, freeze "
                "them (requires_grad_(False)), or call the module that owns them"
            )

    def _differing(self, images: Tensor, labels: Tensor, masks: Tensor) -> list[str]:
        """The parameters whose gradients differ from autograd's, and by how much."""
        stranger = _mirrored(images[:1])
        batch = zip((images, labels, masks), (stranger, labels[:1], masks[:1]), strict=True)
        rows = self._differentiated(1, "float32", *(torch.cat(pair) for pair in batch)).values
        worst = dict.fromkeys(self._parameters, 0.0)
        for position in range(len(images)):
            one = slice(position, position + 1)
            plain = self._plain_gradients(images[one], labels[one], masks[one])
            for name, ratio in self._differences(rows[one], plain).items():
                worst[name] = max(worst[name], ratio)
        return [f"{name} (by {ratio:.1%})" for name, ratio in worst.items() if ratio > TOLERANCE]

    def _in_float64(self) -> "RegionDifferentiator":
        """The same of the network as it was given, but in float64."""
        with recorded():
            model = deep_copy(self._as_given()).double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._parameters)
        example = self._like.new_zeros(self._image_shape, dtype=torch.float64)
        return RegionDifferentiator(model, head="", example=example, classes=self.layout.classes)

    def _plain_gradients(self, image: Tensor, labels: Tensor, masks: Tensor) -> Float[Tensor, "class column"]:
        with recorded(), trainable(self._parameters.values()):
            logits = self._as_given()(image.to(self._like).contiguous().clone())
            if not logits.requires_grad:
                raise ValueError(
                    "expected logits that depend on the parameters, got some that depend on none of "
                    f"{', '.join(self._parameters)}: look for torch.no_grad and detach in the network, and at "
                    "gradients.parameters"
                )
            scores = region_scores(logits, labels.to(logits.device).clone(), masks.to(logits.device).clone())[0]
            rows = [flat_gradients(score, self._parameters.values(), retain_graph=True) for score in scores]
        return torch.stack(rows)

    def _as_given(self) -> nn.Module:
        """The network as it was given, activations in place and all; it has never been called."""
        model = twin(self._fresh)
        for name in self._in_place:
            setattr(model.get_submodule(name), "inplace", True)  # noqa: B010
        return model

    def _differences(self, row: Float[Tensor, "1 value"], plain: Float[Tensor, "class column"]) -> Mapping[str, float]:
        """For each parameter the difference relative to its own norm, or to a small share of the whole if larger."""
        smallest = SMALLEST * plain.norm(dim=1)
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        expected = dict(zip(self._parameters, plain.split(sizes, dim=1), strict=True))
        got = {name: torch.zeros_like(values) for name, values in expected.items()}
        for segment in self.layout.segments:
            packed = row[:, segment.offset : segment.stop]
            got |= {k: v[0] for k, v in parameter_gradients(segment, packed, self.layout.classes).items()}
        return {
            name: _relative(got[name] - values, values.norm(dim=1).maximum(smallest))
            for name, values in expected.items()
        }


def differentiate_bytes(layout: Layout, slices: int, *, threads: int = 1, device: str = "cpu") -> int:
    """About how many bytes it takes to stream the rows of a batch of slices, the network's weights left out.

    For the slices in the network at the same time, on so many CPU threads: their packed rows, what the backward pass
    keeps, the units' inputs, and twice the largest factors, on their way.
    """
    passes = min(threads, SHARES) if device == "cpu" else 1
    inside = min(slices, passes * _together(layout, device))
    widest = max((math.prod(s.input_shape) + math.prod(s.output_shape) for s in layout.segments), default=0)
    inputs = sum(math.prod(s.input_shape) for s in layout.segments if s.form == "gradient")
    unfolded = 0 if device == "cpu" else 4 * WINDOW_VALUES[device]
    return inside * (4 * (layout.values + inputs + 2 * widest) + layout.activation_bytes) + unfolded


def _together(layout: Layout, device: str) -> int:
    """Slices that may go through the network together."""
    return max(1, PASS_BYTES // max(1, layout.activation_bytes)) if device == "cpu" else sys.maxsize


def _mirrored(images: Float[Tensor, "slice modality *space"]) -> Float[Tensor, "slice modality *space"]:
    """Other images, upside down in every modality's intensities: a network may read what is in their range alone."""
    low, high = (values.view(*values.shape, *(1,) * (images.dim() - 2)) for values in images.flatten(2).aminmax(dim=2))
    return (low + high - images.flip(-1)).clamp(low, high)


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


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "torch.utils.checkpoint" not in str(error):
            raise
        raise ValueError(
            "expected a network that keeps its activations for the backward pass, got one that runs parts of itself "
            "again by torch.utils.checkpoint: switch that off (often an argument use_checkpoint)"
        ) from error


def _finite_state(module: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in (*module.parameters(), *module.buffers()))
