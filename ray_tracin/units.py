"""Which modules own the parameters of a network, and how the gradient of one of them follows from what it read.

The one idea: a *unit* is the topmost module on its branch that owns selected parameters itself. Everything the score
knows of those parameters passes through the unit's output, so its input and the score's gradient at its output are
enough. For convolutions, linear layers, normalisations and PReLU the gradient is a formula; a unit of any other kind
has to be run again and differentiated by autograd.

It doesn't know when units run, scores, classes or rows.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from ray_tracin.correlation import POINTWISE, Geometry, Shape, each_axis
from ray_tracin.layers import Form, Kind, Segment, factor_values

Shapes = tuple[Shape, ...]
"""Of the tensors that a unit reads, or writes, in one call."""

KINDS: dict[type[nn.Module], Kind] = {
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
    nn.ConvTranspose1d: "transposed convolution",
    nn.ConvTranspose2d: "transposed convolution",
    nn.ConvTranspose3d: "transposed convolution",
    nn.Linear: "linear",
    nn.BatchNorm1d: "affine",
    nn.BatchNorm2d: "affine",
    nn.BatchNorm3d: "affine",
    nn.InstanceNorm1d: "affine",
    nn.InstanceNorm2d: "affine",
    nn.InstanceNorm3d: "affine",
    nn.GroupNorm: "affine",
    nn.LayerNorm: "affine",
    nn.PReLU: "affine",
}
"""The kinds that have a formula. Subclasses don't: what they compute is their own affair."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A module and those of its parameters that are differentiated, by their names in the network."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        """Values of its parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def kind(self) -> Kind:
        """Which formula the unit's gradient has; ``other`` where it has none, or hooks may change what it computes."""
        module = self.module
        prefix = f"{self.name}." if self.name else ""
        own = {name.removeprefix(prefix) for name in self.parameters} <= {"weight", "bias"}
        plain = "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
        if not (own and plain) or getattr(module, "padding_mode", "zeros") != "zeros":
            return "other"
        return KINDS.get(type(module), "other")


def selected_parameters(model: nn.Module, head: str, selection: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the parameters to differentiate, in the order of the network.

    ``all``: every trainable one. ``head``: the weight of the head alone, which is what the authors' code uses. Patterns
    (``*``, ``?``, ``[…]``) select the trainable parameters whose name matches one of them. Frozen parameters
    (``requires_grad`` is False) are never selected.

    Raises:
        ValueError: no trainable parameter, a head without a trainable weight, or a pattern that matches nothing.
    """
    # One without values, which tells a device, would make its owner a unit with all that is in it.
    trainable = [name for name, value in model.named_parameters() if value.requires_grad and value.numel()]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter (requires_grad is False everywhere): there is nothing "
            "to differentiate. Unfreeze what was trained"
        )
    if selection == "all":
        return tuple(trainable)
    patterns = (f"{head}.weight",) if selection == "head" else (selection,) if isinstance(selection, str) else selection
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise ValueError(
                f"gradients.parameters: {pattern!r} matches no trainable parameter; there are: {', '.join(trainable)}"
            )
    return tuple(name for name in trainable if any(fnmatchcase(name, pattern) for pattern in patterns))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the network in eval mode, without trainable parameters and without activations in place.

    Raises:
        ValueError: a batch normalisation without running statistics, which in eval mode too normalises with those of
            the batch: the gradient of a slice would depend on which others are in its batch. Or TorchScript.
    """
    _refuse_scripts(model)
    # A copy that is made in inference mode could never be differentiated; and PyTorch's gradients of normalisations of
    # tensors whose channels are last aren't all right.
    with torch.inference_mode(False):
        own = deep_copy(model).eval().requires_grad_(False)
        own.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    mixing = []
    for name, module in own.named_modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            mixing.append(name)
    if mixing:
        raise ValueError(
            f"expected slices that don't influence each other, got track_running_stats=False in {', '.join(mixing)}: "
            "use running statistics, or instance or group normalisation"
        )
    return own


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy, what modules keep of earlier calls without its history, with which it can't be copied."""
    kept = [leaf for leaf in _attributes(model) if isinstance(leaf, Tensor)]
    return _copied(model, {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy; functions that modules keep (as hooks, as their forward) hold the copy's modules in it."""
    functions: dict[int, FunctionType] = {}
    for leaf in _attributes(model):
        _gather(leaf, functions)
    for number, function in functions.items():
        cells = tuple(CellType() for _ in function.__code__.co_freevars)
        named = function.__code__, function.__globals__, function.__name__, function.__defaults__
        memo[number] = FunctionType(*named, cells)
        memo[number].__kwdefaults__ = function.__kwdefaults__
        vars(memo[number]).update(vars(function))
    own: nn.Module = copy.deepcopy(model, memo)
    for number, function in functions.items():
        for given, cell in zip(function.__closure__ or (), memo[number].__closure__, strict=True):
            # What was never given a value isn't there.
            with suppress(ValueError):
                cell.cell_contents = _counterpart(given.cell_contents, memo)
    return own


def _attributes(model: nn.Module) -> Iterator[Any]:
    """What modules keep, also in lists and dictionaries."""
    return (leaf for module in model.modules() for leaf in tree_leaves(vars(module)))


def _gather(held: Any, functions: dict[int, FunctionType]) -> None:
    """Adds a function that holds something, and those that it holds."""
    if isinstance(held, FunctionType) and held.__closure__ and id(held) not in functions:
        functions[id(held)] = held
        for cell in held.__closure__:
            with suppress(ValueError):
                _gather(cell.cell_contents, functions)


def _counterpart(held: Any, memo: dict[int, Any]) -> Any:
    if isinstance(held, MethodType):
        return MethodType(held.__func__, _counterpart(held.__self__, memo))
    return memo.get(id(held), held)


def _refuse_scripts(model: nn.Module) -> None:
    script = next((name for name, module in model.named_modules() if isinstance(module, ScriptModule)), None)
    if script is not None:
        raise ValueError(
            f"expected modules that run in Python, got TorchScript ({script or 'the network'}), which can't be "
            "followed: use the network that it was made of"
        )


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters and buffers: hooks on one aren't called by the other."""
    tensors = (*model.parameters(), *model.buffers())
    return _copied(model, {id(tensor): tensor for tensor in tensors})


def find_units(model: nn.Module, names: Sequence[str]) -> list[Unit]:
    """The units that own the named parameters, every parameter in one of them.

    Raises:
        ValueError: a parameter belongs to several modules (tied weights): its gradient is the sum over all of them. Or
            one is complex.
    """
    parameters = dict(model.named_parameters())
    selected = {name: parameters[name] for name in names}
    _refuse_tied(model, selected)
    numbers = [name for name, parameter in selected.items() if parameter.is_complex()]
    if numbers:
        raise ValueError(
            f"expected real parameters, got complex ones: {', '.join(numbers)}. Hold them as real ones with a last "
            "axis of 2 (torch.view_as_complex), or exclude them by gradients.parameters"
        )
    return list(_units_below("", model, selected))


def _refuse_tied(model: nn.Module, selected: dict[str, nn.Parameter]) -> None:
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    tied = [owners[id(parameter)] for parameter in selected.values() if len(owners[id(parameter)]) > 1]
    if tied:
        raise ValueError(
            "expected every parameter in one module, got parameters tied between modules: "
            f"{'; '.join(' = '.join(names) for names in tied)}. Let both places call one module, or exclude them by "
            "gradients.parameters"
        )


def _units_below(path: str, module: nn.Module, selected: dict[str, nn.Parameter]) -> Iterator[Unit]:
    prefix = f"{path}." if path else ""
    inside = {name: selected[name] for name, _ in module.named_parameters(prefix=path) if name in selected}
    if not inside:
        return
    if _owns(module, prefix, inside):
        yield Unit(path, module, inside)
        return
    for name, child in module.named_children():
        yield from _units_below(f"{prefix}{name}", child, inside)


def _owns(module: nn.Module, prefix: str, inside: dict[str, nn.Parameter]) -> bool:
    holders = [
        name for name, child in module.named_children() if isinstance(child, nn.ParameterList | nn.ParameterDict)
    ]
    if parametrize.is_parametrized(module):
        holders.append("parametrizations")
    own = {f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)}
    # Holders of parameters are never called: the module that reads them is the unit.
    return bool(own & inside.keys()) or any(
        name.startswith(tuple(f"{prefix}{holder}." for holder in holders)) for name in inside
    )


def geometry_of(module: nn.Module) -> Geometry | None:
    """How the module's kernel moves; None where it has none."""
    if isinstance(module, nn.Linear):
        return POINTWISE
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not _is_transposed(module):
        return None
    # As it is called now: a network may have given its layers other weights, or one number for all axes.
    moves: Any = module
    kernel, padding = tuple(moves.weight.shape[2:]), moves.padding
    stride, dilation = (each_axis(value, len(kernel)) for value in (moves.stride, moves.dilation))
    if padding == "same":
        spans = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        # An odd total has its larger half after.
        pairs = [(span // 2, span - span // 2) for span in spans]
    else:
        pairs = [(width, width) for width in each_axis(0 if padding == "valid" else padding, len(kernel))]
    return Geometry(kernel, stride, dilation, tuple(pairs), moves.groups)


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


def plan_segments(
    units: Mapping[str, Unit],
    read: Mapping[str, Sequence[Shapes]],
    written: Mapping[str, Sequence[Shapes]],
    classes: int,
) -> tuple[Segment, ...]:
    """The segments of a packed row, one a unit, from what each read and wrote, call by call, for one slice.

    Factors where they are smaller than the gradients of all classes. The row has the order of ``read``.
    """
    segments: list[Segment] = []
    for name in read:
        offset = segments[-1].stop if segments else 0
        segments.append(_segment(units[name], read[name], written[name], classes, offset))
    return tuple(segments)


def _segment(unit: Unit, read: Sequence[Shapes], written: Sequence[Shapes], classes: int, offset: int) -> Segment:
    kind = unit.kind()
    if not all(_has_formula(unit, kind, *call) for call in zip(read, written, strict=True)):
        kind = "other"
    input_shape, output_shape = ((), ()) if kind == "other" else (_of_slice(read[0][0]), _of_slice(written[0][0]))
    geometry = None if kind == "other" else geometry_of(unit.module)
    gradient, factors = classes * unit.size, factor_values(classes, input_shape, output_shape)
    # The gradients of several calls add up, their factors don't.
    form: Form = "factors" if geometry is not None and len(read) == 1 and factors < gradient else "gradient"
    return Segment(
        unit=unit.name,
        kind=kind,
        form=form,
        parameters=tuple(unit.parameters),
        shapes=tuple(tuple(parameter.shape) for parameter in unit.parameters.values()),
        input_shape=input_shape,
        output_shape=output_shape,
        geometry=geometry,
        offset=offset,
        length=factors if form == "factors" else gradient,
    )


def _has_formula(unit: Unit, kind: Kind, read: Shapes, written: Shapes) -> bool:
    """Whether a call is of the usual form: one tensor in and one out, a slice a row of its first axis."""
    if kind == "other" or len(read) != 1 or len(written) != 1:
        return False
    shape = read[0]
    if kind == "linear" or isinstance(unit.module, nn.LayerNorm):
        return len(shape) > 1
    axes = 2 if kind == "affine" else next(unit.module.parameters()).dim()
    return len(shape) >= axes and shape[0] == 1


def _of_slice(shape: Shape) -> Shape:
    return shape[1:] if shape[0] == 1 else shape


def affine_gradients(
    unit: Unit, inputs: Float[Tensor, "row *read"], output_gradients: Float[Tensor, "row *read"], slices: int
) -> Float[Tensor, "slice column"]:
    """The gradients of a unit that computes ``weight · x̂ + bias``: ``Σ D · x̂`` and ``Σ D``, D the output gradient."""
    columns = []
    for name, parameter in unit.parameters.items():
        if name.endswith("bias"):
            columns.append(_channel_sums(unit.module, output_gradients, parameter.numel(), slices))
        elif isinstance(unit.module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            columns.append(_batch_norm_weight(unit.module, inputs, output_gradients, slices))
        else:
            scaled = output_gradients * scaled_input(unit.module, inputs)
            columns.append(_channel_sums(unit.module, scaled, parameter.numel(), slices))
    return torch.cat(columns, dim=1)


def _channel_sums(module: nn.Module, values: Tensor, channels: int, slices: int) -> Float[Tensor, "slice column"]:
    if isinstance(module, nn.LayerNorm):
        return values.reshape(slices, -1, channels).sum(1)
    return values.reshape(slices, channels, -1).sum(2)


def _batch_norm_weight(
    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, inputs: Tensor, output_gradients: Tensor, slices: int
) -> Float[Tensor, "slice column"]:
    """``Σ D · (x − μ) / σ`` as ``(Σ D · x − μ Σ D) / σ``: two passes over the activations and no copy of them."""
    assert module.running_mean is not None, "refused by frozen_copy"
    assert module.running_var is not None, "refused by frozen_copy"
    read, asked = (part.reshape(slices, len(module.running_mean), -1) for part in (inputs, output_gradients))
    centred: Tensor = torch.linalg.vecdot(asked, read).double() - module.running_mean.double() * asked.sum(2).double()
    return (centred * (module.running_var.double() + module.eps).rsqrt()).to(inputs.dtype)


def scaled_input(module: nn.Module, inputs: Float[Tensor, "row *read"]) -> Float[Tensor, "row *read"]:
    """The ``x̂`` that the module's weight multiplies, in eval mode."""
    if isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        own = not module.track_running_stats
        return F.instance_norm(inputs, module.running_mean, module.running_var, use_input_stats=own, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(inputs, module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    assert isinstance(module, nn.PReLU), type(module)
    return inputs.clamp(max=0)


def flat_gradients(
    value: Tensor, parameters: Iterable[nn.Parameter], upstream: Tensor | None = None, *, retain_graph: bool = False
) -> Float[Tensor, " column"]:
    """The gradient of a value in some parameters, flattened one after the other; 0 for those it doesn't depend on."""
    listed = list(parameters)
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in listed])
    gradients = torch.autograd.grad(
        value, listed, upstream, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    # Those of an embedding may be sparse.
    return torch.cat([gradient.to_dense().flatten() for gradient in gradients])


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are recorded and the parameters require them; after, the parameters don't."""
    listed = list(parameters)
    for parameter in listed:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in listed:
            parameter.requires_grad_(False)
