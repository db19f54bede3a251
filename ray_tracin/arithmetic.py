"""In which precision, threads and memory gradients are computed and multiplied, and the products themselves.

The one idea: float32 is what everything is held in and accumulated in; what may be coarser is the operands that tensor
cores multiply. ``float32`` keeps 24 bits of them, ``tf32`` 11, ``bfloat16`` 8 (its convolutions stay tf32, because the
rounding of activations adds up over layers, that of two factors of a product doesn't). On a CPU, which has no tf32,
that is float32.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ray_tracin.vocabulary import Precision

Result = TypeVar("Result")

MIXED_DEVICES = ("cuda",)
"""Devices that multiply matrices of bfloat16 as they are, into float32, which is exact but for its sums."""


@contextmanager
def arithmetic(precision: Precision = "float32") -> Iterator[None]:
    """Inside, convolutions are deterministic, and they and products have operands of a precision.

    TF32 is cuDNN's default, and a program may have chosen it, or less, for products, on a CPU too.
    """
    backends: Any = torch.backends
    cudnn, products, cpu = backends.cudnn, backends.cuda.matmul, backends.mkldnn
    with ExitStack() as switches:
        for switch, value in (("enabled", True), ("benchmark", False), ("deterministic", True)):
            switches.enter_context(_switched(cudnn, switch, value))
        if hasattr(products, "fp32_precision"):
            # Since PyTorch 2.9, which refuses to read the older switches once a program has used these.
            operands = "ieee" if precision == "float32" else "tf32"
            for owner, wanted in (
                (cudnn.conv, operands),
                (products, operands),
                (cpu.conv, "ieee"),
                (cpu.matmul, "ieee"),
            ):
                switches.enter_context(_switched(owner, "fp32_precision", wanted))
        else:
            for owner in (cudnn, products):
                switches.enter_context(_switched(owner, "allow_tf32", precision != "float32"))
        yield


@contextmanager
def _switched(owner: Any, switch: str, value: Any) -> Iterator[None]:
    before = getattr(owner, switch)
    setattr(owner, switch, value)
    try:
        yield
    finally:
        setattr(owner, switch, before)


@runtime_checkable
class Each(Protocol):
    """Calls a function with each of some arguments."""

    def __call__(self, function: Callable[..., Result], /, *arguments: Sequence[Any]) -> list[Result]:
        """The results; arguments as `map` takes them."""
        ...


@contextmanager
def shared_threads(parts: int) -> Iterator[Each]:
    """A map whose calls run at the same time, up to so many, and share the CPU threads of this one.

    On one thread, or for one call, it is a plain loop.
    """
    threads = torch.get_num_threads()
    workers = min(parts, threads)

    def begin() -> None:
        # Asked first, because a thread takes over the number of the process when it first needs it.
        torch.get_num_threads()
        torch.set_num_threads(threads // workers)

    try:
        with ThreadPoolExecutor(workers, initializer=begin) as pool:

            def each(function: Callable[..., Result], *arguments: Sequence[Any]) -> list[Result]:
                if workers == 1 or len(arguments[0]) == 1:
                    return list(map(function, *arguments))
                return list(pool.map(function, *arguments))

            yield each
    finally:
        # After the last of them has begun: threads that are started later take over the last number that was set.
        torch.set_num_threads(threads)


def return_freed_memory() -> None:
    """Gives back to the system what the C library holds of freed memory, where it is one that can be asked to (glibc).

    Each thread has a store of its own there, of which other threads get nothing.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that values of a stored one are multiplied and added in: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def multiply(
    left: Float[Tensor, "row column"], right: Float[Tensor, "other column"], precision: Precision = "float32"
) -> Float[Tensor, "row other"]:
    """The inner products of the rows of two matrices, accumulated in float32 (in float64 if they are)."""
    if left.dtype == torch.float64:
        return left @ right.mT
    left, right = operands(left, precision), operands(right, precision)
    if precision == "bfloat16" and left.device.type in MIXED_DEVICES:
        return torch.mm(left, right.mT, out_dtype=torch.float32)
    return inner_products(left, right)


def operands(rows: Float[Tensor, "row column"], precision: Precision) -> Float[Tensor, "row column"]:
    """Rows as `multiply` takes them in a precision, so that rows of several products are rounded once."""
    if precision != "bfloat16" or rows.dtype == torch.float64:
        return rows
    rows = rows.bfloat16()
    # A CPU's product of bfloat16 would be rounded to bfloat16.
    return rows if rows.device.type in MIXED_DEVICES else rows.float()


def inner_products(
    left: Float[Tensor, "row column"], right: Float[Tensor, "other column"]
) -> Float[Tensor, "row other"]:
    """``left @ right.mT`` of matrices without gradients, by the library whose kernels are the faster ones here."""
    empty = 0 in (*left.shape, *right.shape)
    if left.device.type == "cpu" and left.dtype == torch.float32 and not empty and prefers_onednn():
        # Its products with a part of longer rows take a thousand times as long.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.contiguous(), None, "none", [], "")
        return product
    return left @ right.mT


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 faster than PyTorch's `@`, which is MKL's.

    On AMD's Zen 5 it is twice as fast, because MKL is no faster there than AVX2 would be and oneDNN uses AVX-512; on
    Zen 4 by a seventh or so.
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not there or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False
