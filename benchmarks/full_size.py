"""The paper's tensor on one device: from slices in host memory to the sum over checkpoints, timed and checked.

    python benchmarks/full_size.py --device cuda
    python benchmarks/full_size.py --slices 48 --width 8 --size 96 --checkpoints 2

The defaults are the paper's numbers: 2070 train slices of 192², width 64, five checkpoints, three classes. Slices and
lesions are random, and so are the weights of the networks, as in ``benchmarks/engine.py``; it needs no more than that.

Without ``--block`` the packed rows of all slices lie on the device (78 GB in bfloat16 at the paper's size, what a GPU
gets unless told otherwise). With it, those of two blocks of slices do, and a block is differentiated again for every
other one that it meets; a GPU of 80 GB wants ``--block 690``.

A batch is differentiated and multiplied before the clock starts, so that the libraries are there. The floor is the
time of the same operations, zeros counted, at the rates of the device's own matrix product: of passes in the precision
of convolutions, which is tf32 where products are bfloat16, of the kernel in that of products. The check takes some
slices at random: the entries of their regions, by plain autograd in float64.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from functools import partial

import torch
from engine import CLASSES, Problem, Rows, in_float64, machine, make_problem, matmul_rate, operations, peak_bytes
from torch import Tensor, nn

from ray_tracin.influence import EXPANDED_VALUES, sum_checkpoints, tile_kernel, train_columns
from ray_tracin.vocabulary import Precision, ranges

USUAL = "bfloat16 on a GPU, else float32, unless given"
LEARNING_RATE = 1e-3
"""Of the first checkpoint; half of it at each further one."""


class Timer:
    """Seconds by the name of what took them, the device's own work waited for."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def checkpoints(network: nn.Module, count: int) -> list[nn.Module]:
    """Networks around the first: as checkpoints of a training differ, a step of noise after the other."""
    generator = torch.Generator().manual_seed(1)
    found = [network]
    for _ in range(count - 1):
        moved = copy.deepcopy(found[-1])
        with torch.no_grad():
            for parameter in moved.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.05 * float(parameter.std(correction=0)))
        found.append(moved)
    return found


def kernel_of(problem: Problem, options: argparse.Namespace, timer: Timer) -> Tensor:
    """The kernel of a checkpoint: (class, query, class, train), in host memory."""
    count = options.slices
    network, *slices = problem
    on_device = copy.deepcopy(network).to(options.device), slices[0], slices[1], slices[2]
    make = Rows(on_device, options.batch, options.dtype, options.precision)
    kernel = torch.empty(CLASSES, count, CLASSES, count)
    chunk = EXPANDED_VALUES[make.device.type]
    multiply = partial(tile_kernel, make.form.layout, chunk_values=chunk, precision=options.precision)
    timer.lap("networks")
    for (start, stop), others in _blocks(count, options.block or count):
        rows = make(start, stop)
        timer.lap("gradients")
        kernel[:, start:stop, :, start:stop] = multiply(partial(make.form.read, rows), None)[0].cpu()
        timer.lap("products")
        for first, last in others:
            other = make(first, last)
            timer.lap("gradients")
            tile = multiply(partial(make.form.read, rows), partial(make.form.read, other))[0].cpu()
            kernel[:, start:stop, :, first:last] = tile
            kernel[:, first:last, :, start:stop] = tile.permute(2, 3, 0, 1)
            del other
            timer.lap("products")
        del rows
    return kernel


def _blocks(count: int, size: int) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Each block of slices, and those after it."""
    blocks = ranges(count, size)
    return ((block, blocks[number + 1 :]) for number, block in enumerate(blocks))


def difference(tensor: Tensor, problems: list[Problem], rates: Tensor, options: argparse.Namespace) -> float:
    """Relative difference, in the Frobenius norm, of the entries of some slices from plain autograd's in float64."""
    chosen = torch.randperm(options.slices, generator=torch.Generator().manual_seed(2))[: options.checked]
    device = torch.device(options.device)
    kernels = []
    for network, *parts in problems:
        images, labels, masks = (part[chosen].to(device) for part in parts)
        kernels.append(train_columns(in_float64((network.to(device), images, labels, masks)).cpu()))
    expected = sum(rate * kernel.double() for rate, kernel in zip(rates.tolist(), kernels, strict=True))
    assert isinstance(expected, Tensor)
    got = tensor.unflatten(2, (CLASSES, -1))[:, chosen][..., chosen].flatten(2)
    return float((got - expected).norm() / expected.norm())


def compute(problems: list[Problem], rates: Tensor, options: argparse.Namespace, timer: Timer) -> Tensor:
    """The tensor of eq. 6 from networks and slices in host memory: (class, query, column)."""
    kernels = torch.stack([train_columns(kernel_of(problem, options, timer)) for problem in problems])
    tensor = sum_checkpoints(kernels, rates)
    timer.lap("sum over checkpoints")
    return tensor


def warm_up(problem: Problem, options: argparse.Namespace) -> None:
    """Loads what the device's libraries load when they are first used."""
    network, *parts = problem
    on_device = copy.deepcopy(network).to(options.device), parts[0], parts[1], parts[2]
    make = Rows(on_device, options.batch, options.dtype, options.precision)
    read = partial(make.form.read, make(0, min(options.batch, options.slices)))
    tile_kernel(
        make.form.layout, read, None, chunk_values=EXPANDED_VALUES[make.device.type], precision=options.precision
    )


def report(options: argparse.Namespace) -> str:
    """The figures as a table."""
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    network, *parts = make_problem(options.slices, options.width, options.size)
    problems: list[Problem] = [(one, parts[0], parts[1], parts[2]) for one in checkpoints(network, options.checkpoints)]
    rates = LEARNING_RATE * 0.5 ** torch.arange(options.checkpoints)
    passes: Precision = "float32" if options.precision == "float32" else "tf32"
    of_product = {precision: matmul_rate(device, precision) for precision in dict.fromkeys((passes, options.precision))}
    warm_up(problems[0], options)
    timer = Timer(device)
    tensor = compute(problems, rates, options, timer)
    peak, host = peak_bytes(device), peak_bytes(torch.device("cpu"))
    seconds = sum(timer.seconds.values())
    flops, columns = operations(options)
    floor = options.checkpoints * sum(
        part / of_product[one] for part, one in zip(flops, (passes, options.precision), strict=True)
    )
    rows = [
        ("tensor", " × ".join(map(str, tensor.shape))),
        ("seconds, slices in host memory to tensor", f"{seconds:.2f}"),
        *((f"of these, {name}", f"{spent:.2f}") for name, spent in timer.seconds.items()),
        ("PFLOP, zeros counted", f"{options.checkpoints * sum(flops) / 1e15:.3g}"),
        *((f"matrix product in {one}, TFLOP/s", f"{rate / 1e12:.3g}") for one, rate in of_product.items()),
        ("seconds at that rate (the floor)", f"{floor:.2f}"),
        ("floor ÷ seconds", f"{floor / seconds:.0%}"),
        ("peak memory of the device, GB", f"{peak / 1e9:.2f}"),
        ("peak memory of the host, GB", f"{host / 1e9:.2f}"),
        (
            f"relative difference from float64, {options.checked} slices at random",
            f"{difference(tensor, problems, rates, options):.1e}",
        ),
    ]
    head = (
        f"{options.slices} slices × {CLASSES} classes × {columns:,} parameters × {options.checkpoints} checkpoints, "
        f"{options.size}², {options.dtype} rows, {options.precision} operands, batches of {options.batch}, "
        f"{'one block' if not options.block else f'blocks of {options.block}'}; {machine(options)}"
    )
    return "\n".join([head, "", "| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Parse, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=2070)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--block", type=int, default=0, help="slices whose rows are made together; 0: all of them")
    parser.add_argument("--batch", type=int, default=16, help="slices that are differentiated at once")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help=f"of kept rows; {USUAL}")
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], help=f"of products; {USUAL}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checked", type=int, default=6, help="slices whose entries are compared with float64")
    options = parser.parse_args()
    usual = "bfloat16" if options.device == "cuda" else "float32"
    options.dtype, options.precision = options.dtype or usual, options.precision or usual
    print(report(options))


if __name__ == "__main__":
    main()
