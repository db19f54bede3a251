"""What units read and write while a network runs: hooks around them, a call of a unit, and the trace of an example.

The one idea: a unit's arguments and outputs are trees of tensors (a tuple, a dictionary, a single tensor). Taken apart
into leaves they are all treated alike, and a unit of any signature can be run again on the part of one slice.

It doesn't know scores, classes or rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ray_tracin.arithmetic import arithmetic
from ray_tracin.correlation import Shape
from ray_tracin.units import Shapes, Unit, flat_gradients, trainable
from ray_tracin.vocabulary import Precision


@dataclass(frozen=True)
class Call:
    """What a unit read in one call: the leaves of its arguments, and the versions of its tensors at that time."""

    unit: Unit
    leaves: tuple[Any, ...]
    structure: TreeSpec
    versions: tuple[int, ...]

    @classmethod
    def of(cls, unit: Unit, arguments: tuple[Any, ...], keywords: dict[str, Any], *, copied: bool = False) -> "Call":
        """The call of a unit; ``copied`` where the network later writes into what the unit has read."""
        leaves, structure = tree_flatten((arguments, keywords))
        held = tuple(_held(leaf, copied) for leaf in leaves)
        return cls(unit, held, structure, tuple(leaf._version for leaf in held if isinstance(leaf, Tensor)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the leaves."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def overwritten(self) -> bool:
        """Whether a tensor has been changed in place since the unit read it."""
        return any(leaf._version != version for leaf, version in zip(self.tensors, self.versions, strict=True))

    def replayed(
        self, output: int, output_gradient: Tensor, slices: int, shared: Sequence[bool]
    ) -> Float[Tensor, "slice column"]:
        """The gradients of the unit, of any kind: run again on each slice's part of the inputs, and differentiated.

        ``output`` numbers the leaf of what the unit writes that the gradient belongs to; ``shared`` says of each tensor
        that it reads whether that is the same for all slices instead of having a part for each.
        """
        try:
            with trainable(self.unit.parameters.values()):
                return torch.stack([self._of_slice(n, output, output_gradient, slices, shared) for n in range(slices)])
        except RuntimeError as error:
            error.add_note(
                f"Unit {self.unit.name!r} was run again on one slice's part of the tensors that it is called with "
                "(also those in tuples, lists and dictionaries): it may depend on nothing else in which slices differ"
            )
            raise

    def _of_slice(
        self, position: int, output: int, output_gradient: Tensor, slices: int, shared: Sequence[bool]
    ) -> Float[Tensor, " column"]:
        arguments, keywords = tree_unflatten(self._part(position, slices, shared), self.structure)
        written = tree_leaves(self.unit.module(*arguments, **keywords))[output]
        upstream = _part(output_gradient, position, slices)
        return flat_gradients(written, self.unit.parameters.values(), upstream)

    def _part(self, position: int, slices: int, shared: Sequence[bool]) -> list[Any]:
        whole = iter(shared)
        # Cloned, because a unit may write into what it reads, and is run once a class.
        return [
            (leaf if next(whole) else _part(leaf, position, slices)).clone() if isinstance(leaf, Tensor) else leaf
            for leaf in self.leaves
        ]


def _held(leaf: Any, copied: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    # A detached tensor shares its version counter with the one that the network goes on with.
    return leaf.detach().clone() if copied else leaf.detach()


def _part(values: Tensor, position: int, slices: int) -> Tensor:
    return values if slices == 1 else values.unflatten(0, (slices, -1))[position]


Read = Callable[[Unit, tuple[Any, ...], dict[str, Any]], None]
Written = Callable[[Unit, Any], Any]
Made = Callable[[Any], Any]


@contextmanager
def hooked(units: Sequence[Unit], read: Read, written: Written, made: Made = lambda output: output) -> Iterator[None]:
    """Inside, ``read`` is told what a unit is called with, and ``written`` replaces what it returns.

    What hooks of its own see has been replaced by ``made`` before.
    """

    def before(unit: Unit) -> Callable[..., None]:
        return lambda _, arguments, keywords: read(unit, arguments, keywords)

    def after(unit: Unit) -> Callable[..., Any]:
        return lambda _, arguments, keywords, output: written(unit, output)

    handles = []
    for unit in units:
        # First before and last after the module's own hooks: with them it is the unit that runs.
        handles.append(unit.module.register_forward_pre_hook(before(unit), prepend=True, with_kwargs=True))
        if unit.module._forward_hooks:
            handles.append(unit.module.register_forward_hook(lambda _, arguments, output: made(output), prepend=True))
        handles.append(unit.module.register_forward_hook(after(unit), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Trace:
    """What each unit read and wrote in one forward pass, call by call; units in the order of their first calls."""

    logits: Any = None
    read: dict[str, list[Shapes]] = field(default_factory=dict)
    written: dict[str, list[Shapes]] = field(default_factory=dict)
    told: dict[str, list[tuple[int | tuple[int, ...], ...]]] = field(default_factory=dict)
    """Numbers and sizes among a unit's arguments."""
    kept_bytes: int = 0
    """What autograd keeps for a backward pass through the activations."""

    def doubled_by(self, other: "Trace") -> bool:
        """Whether twice as many slices make twice as long first axes of all that units write.

        What units read may also stay as it is: it is then the same for all slices. What they are told has to: a unit
        that is told how many slices there are can't be run again on one of them.
        """
        if [*map(len, self.written.values())] != [*map(len, other.written.values())] or self.told != other.told:
            return False
        return all(_doubled(one, two) for one, two in _pairs(self.written, other.written)) and all(
            one == two or _doubled(one, two) for one, two in _pairs(self.read, other.read)
        )


def _pairs(
    mine: Mapping[str, Sequence[Shapes]], theirs: Mapping[str, Sequence[Shapes]]
) -> Iterator[tuple[Shape, Shape]]:
    for name, calls in mine.items():
        for one, two in zip(calls, theirs[name], strict=True):
            yield from zip(one, two, strict=True)


def _doubled(one: Shape, two: Shape) -> bool:
    return bool(one) and two == (2 * one[0], *one[1:])


def trace(model: nn.Module, units: Sequence[Unit], images: Float[Tensor, "slice modality *space"]) -> Trace:
    """What the network did with some slices."""
    result = Trace()
    kept: dict[int, Tensor] = {}

    def read(unit: Unit, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        result.read.setdefault(unit.name, []).append(_shapes((arguments, keywords)))
        told = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, int | tuple)]
        result.told.setdefault(unit.name, []).append(tuple(told))

    def written(unit: Unit, output: Any) -> Any:
        result.written.setdefault(unit.name, []).append(_shapes(output))
        return output

    def keep(tensor: Tensor) -> None:
        # Held here, so that no other takes its address, and not by the graph, which nobody goes back through: a
        # result that holds the tensor that it is would never be freed.
        kept[_storage(tensor)] = tensor.detach()

    with hooked(units, read, written), torch.autograd.graph.saved_tensors_hooks(keep, _unread):
        result.logits = model(images.clone().requires_grad_().clone())
    own = {_storage(value) for value in (*model.parameters(), *model.buffers())}
    result.kept_bytes = sum(kept[address].untyped_storage().nbytes() for address in kept.keys() - own)
    return result


def _unread(_: Any) -> Tensor:
    raise ValueError(
        "expected a network that only goes forward, got one that differentiates while it runs (torch.autograd.grad, "
        "backward), through which nobody can go back"
    )


def _storage(tensor: Tensor) -> int:
    # Not the address of the data: tensors on the meta device have none, and the plan of a run is made on it.
    return int(tensor.untyped_storage()._cdata)


def _shapes(tree: Any) -> Shapes:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def recorded(precision: Precision = "float32") -> Iterator[None]:
    """Inside, gradients are recorded, whatever is switched off outside, in the arithmetic of a precision."""
    with torch.inference_mode(False), torch.enable_grad(), arithmetic(precision):
        yield
