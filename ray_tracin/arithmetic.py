"""In which precision and on how many threads gradients are computed and multiplied, and the products themselves.

The one idea: float32 is what everything is held in and accumulated in; what may be coarser is the operands that tensor
cores multiply. ``float32`` keeps 24 bits of them, ``tf32`` 11, ``bfloat16`` 8 (its convolutions stay tf32, because the
rounding of activations adds up over layers, that of two factors of a product doesn't). On a CPU, which has no tf32,
that is float32.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from ray_tracin.vocabulary import Precision


@contextmanager
def arithmetic(precision: Precision = "float32") -> Iterator[None]:
    """Inside, convolutions are deterministic, and they and products have operands of a precision."""
    coarse = precision != "float32"
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    # TF32 is cuDNN's default, and could be switched on for products elsewhere.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=coarse):
        products.allow_tf32 = coarse
        try:
            yield
        finally:
            products.allow_tf32 = before


@contextmanager
def shared_threads(parts: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of Python threads, one a part, that share the CPU threads of this one."""
    threads = torch.get_num_threads()

    def begin() -> None:
        # Asked first, because a thread takes over the number of the process when it first needs it.
        torch.get_num_threads()
        torch.set_num_threads(max(1, threads // parts))

    try:
        with ThreadPoolExecutor(parts, initializer=begin) as pool:
            yield pool
    finally:
        # Threads that are started later take over the last number that was set.
        torch.set_num_threads(threads)


def multiply(
    left: Float[Tensor, "row column"], right: Float[Tensor, "other column"], precision: Precision = "float32"
) -> Float[Tensor, "row other"]:
    """The inner products of the rows of two matrices, accumulated in float32 (in float64 if they are)."""
    if left.dtype == torch.float64:
        return left @ right.mT
    if precision == "bfloat16":
        left, right = left.bfloat16(), right.bfloat16()
        if left.is_cuda:
            return torch.mm(left, right.mT, out_dtype=torch.float32)
        # A CPU's product of bfloat16 would be rounded to bfloat16.
        left, right = left.float(), right.float()
    return left @ right.mT
