"""The passes of a batch through a network: one forward, a backward of the activations a class, and the rows they fill.

The one idea: a unit's input is seen when it is called, and its output gradient when it passes the unit's output on the
way back. Both go where the layout wants them, as they are or as the gradient that they make, and autograd is asked for
the gradient of no parameter.

It doesn't know what is differentiated, or how a batch is cut into passes.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ray_tracin import correlation
from ray_tracin.layers import Layout, Segment, unit_gradients
from ray_tracin.localized import LocalBackward
from ray_tracin.recording import Call, hooked
from ray_tracin.units import Shapes, Unit, affine_gradients


class Passes:
    """One forward pass of a batch, the backward passes of its classes, and the rows ``values`` that they fill.

    ``read`` says what each call of a unit read on the example; inputs of the units in ``copied`` are kept as copies.
    """

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
        self._begun: set[tuple[str, int]] = set()
        # What doesn't depend on a unit before it depends on this: a backward pass to here reaches every unit, and
        # goes no further than the first of them.
        self._anchor = values.new_zeros((), requires_grad=True)
        self._anchored = self._foreign = False

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The logits of images.

        Raises:
            ValueError: a unit is called more often than on the example.
        """
        local = LocalBackward() if images.device.type in correlation.BOXED_DEVICES else nullcontext()
        with local, hooked(list(self._units.values()), self._keep_input, self._watch_output, self._tie):
            logits: Tensor = model(images.clone())
        return logits

    def backward(self, scores: Float[Tensor, "slice class"]) -> None:
        """Differentiates scores that are functions of the logits; after that, the rows are whole."""
        for column in range(self._classes if scores.requires_grad else 0):
            self._class = column
            more = column + 1 < self._classes
            torch.autograd.grad(scores[:, column].sum(), self._anchor, retain_graph=more, allow_unused=True)
            # Not inside the backward pass: a replay is a backward pass of its own.
            for arrival in self._to_replay:
                self._replay(*arrival)
            self._to_replay.clear()
        self._clear_the_rest()

    def _clear_the_rest(self) -> None:
        """Rows come as whatever was in memory: what nothing was written to is 0."""
        for unit, column in {*product(self._segments, range(self._classes))} - self._begun:
            self._place(unit, column).zero_()
        for unit in self._segments.keys() - self._calls.keys():
            segment = self._segments[unit]
            self._values[:, segment.offset : segment.offset + segment.input_values] = 0

    def _keep_input(self, unit: Unit, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls = self._calls.setdefault(unit.name, [])
        if len(calls) == len(self._example_read.get(unit.name, ())):
            raise ValueError(
                f"unit {unit.name!r} was called {len(calls)} times on the example and more often on this batch: the "
                "number of calls must not depend on the slices"
            )
        segment = self._segments[unit.name]
        call = Call.of(unit, arguments, keywords, copied=unit.name in self._copied)
        if segment.form == "factors":
            inputs = call.tensors[0].reshape(len(self._values), -1)
            self._values[:, segment.offset : segment.offset + inputs.shape[1]] = inputs
            call = Call.of(unit, (), {})
        calls.append(call)

    def _watch_output(self, unit: Unit, output: Any) -> Any:
        number = len(self._calls[unit.name]) - 1
        tied = self._tie(output)
        for place, leaf in enumerate(tree_leaves(tied)):
            if _is_differentiable(leaf) and leaf.requires_grad:
                # A hook on the tensor, not on the module: it sees the gradient of what the unit wrote even where the
                # network goes on to change that in place.
                leaf.register_hook(partial(self._take, unit, number, place))
        return tied

    def _tie(self, output: Any) -> Any:
        """What a unit returns, such that all its tensors depend on the anchor."""
        leaves, structure = tree_flatten(output)
        # One of several may be made from another: a tensor of its own sees only what comes from outside the unit.
        alone = sum(map(_is_differentiable, leaves)) == 1
        return tree_unflatten([self._tied(leaf, alone) for leaf in leaves], structure)

    def _tied(self, leaf: Any, alone: bool) -> Any:
        if not _is_differentiable(leaf):
            return leaf
        # What requires a gradient before anything depends on the anchor has it from the network itself.
        self._foreign |= leaf.requires_grad and not self._anchored
        # Writing into a view makes its history anew, without the hook.
        enough = leaf.requires_grad and alone and not leaf._is_view() and not self._foreign
        tied = leaf if enough else leaf + self._anchor
        self._anchored |= tied.requires_grad
        return tied

    def _take(self, unit: Unit, number: int, place: int, output_gradient: Tensor | None) -> None:
        if output_gradient is None:
            return  # An operation of the network's own gives this input none, which means 0.
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
        place = self._place(segment.unit, self._class)
        if (segment.unit, self._class) in self._begun:
            place += part
        else:
            place.copy_(part)
            self._begun.add((segment.unit, self._class))

    def _place(self, unit: str, column: int) -> Float[Tensor, "slice part"]:
        """Where the rows hold what belongs to a unit and a class."""
        segment = self._segments[unit]
        length = (segment.length - segment.input_values) // self._classes
        start = segment.offset + segment.input_values + column * length
        return self._values[:, start : start + length]


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _formula(segment: Segment, call: Call, output_gradient: Tensor, slices: int) -> Float[Tensor, "slice column"]:
    inputs = call.tensors[0]
    if segment.geometry is None:
        return affine_gradients(call.unit, inputs, output_gradient, slices)
    if segment.kind == "linear":
        inputs, output_gradient = (part.reshape(slices, -1, part.shape[-1]) for part in (inputs, output_gradient))
    return unit_gradients(segment, inputs, output_gradient)
