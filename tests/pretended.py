"""A GPU that is none: a device whose tensors lie in host memory, and that is otherwise as strict as a GPU.

It refuses operations on tensors of both devices, and those of the host's NumPy; it multiplies bfloat16 into float32,
which a CPU can't. The program sees a device type that isn't "cpu" and takes the ways that it takes on a GPU, with
numbers. What it can't tell is how a GPU rounds, and how fast it is.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ray_tracin import arithmetic, correlation, influence

aten = torch.ops.aten
HOST = torch.device("cpu")
DEVICE = torch.device("lazy", 0)
"""The one type, unused on any machine, that autograd asks for no streams and threads of its own."""
MOVES = (aten._to_copy.default, aten.copy_.default)


class Remote(Tensor):
    """A tensor that says it is on the device, around the host's that has its values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Remote":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=DEVICE, **layout)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


class Present(TorchDispatchMode):
    """Inside, tensors can be made on the device and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


def operate(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives, on the device that it is asked for or that its tensors are on."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        # What inference mode hands over whole.
        with Present():
            return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(one, Remote) for one in tensors]
    strangers = [tuple(one.shape) for one in tensors if not isinstance(one, Remote) and one.dim()]
    if any(there) and strangers and func not in MOVES:
        raise RuntimeError(f"{func} on the device got tensors of the host, of shapes {strangers}")
    wanted = kwargs.get("device")
    remote = any(there) if wanted is None else wanted == DEVICE
    if func is aten.copy_.default:
        remote = there[0]
    if wanted is not None:
        kwargs = kwargs | {"device": HOST if remote else wanted}
    result = MIXED.get(func, func)(*tree_map(_values, args), **tree_map(_values, kwargs))
    if not remote:
        return result
    # What an operation writes to it also returns.
    known = {id(one.values): one for one in tensors if isinstance(one, Remote)}
    return tree_map(lambda one: _there(one, known), result)


def _there(leaf: Any, known: Mapping[int, Remote]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return known[id(leaf)] if id(leaf) in known else Remote(leaf)


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, Remote) else leaf


def _mixed(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product of bfloat16 whose terms are exact and summed in float32."""

    def multiply(left: Tensor, right: Tensor, dtype: torch.dtype, **out: Tensor) -> Tensor:
        assert (left.dtype, right.dtype, dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        return product(left.float(), right.float(), **out)

    return multiply


MIXED = {
    aten.mm.dtype: _mixed(torch.mm),
    aten.bmm.dtype: _mixed(torch.bmm),
    aten.bmm.dtype_out: _mixed(torch.bmm),
}


@contextmanager
def gpu(values: int = 1 << 12) -> Iterator[torch.device]:
    """Inside, the program has such a device, and its steps, on one thread, take it for their work.

    It holds so many values of windows and of expanded gradients at a time: few, so that all is done in several parts.
    """
    with pytest.MonkeyPatch.context() as patch, Present():
        patch.setitem(correlation.WINDOW_VALUES, DEVICE.type, values)
        patch.setitem(influence.SMALLEST_PANEL, DEVICE.type, 5)
        patch.setitem(influence.EXPANDED_VALUES, DEVICE.type, values)
        patch.setattr(arithmetic, "MIXED_DEVICES", (DEVICE.type,))
        for name, module in list(sys.modules.items()):
            for choice in ("pick_device", "device_here"):
                if name.startswith("ray_tracin.") and hasattr(module, choice):
                    patch.setattr(module, choice, lambda run: DEVICE)
        # Parameters are made anew when a module moves: one can't turn into a tensor of another class.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield DEVICE
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
