"""Seconds, operations and memory of region gradients and their kernel: this engine against plain autograd, same rows.

    python benchmarks/engine.py --slices 96 --width 16 --size 96 --rounds 3

Runs without Ray, Zarr and NiBabel, where torch, numpy, pydantic, PyYAML and jaxtyping are. Every method runs in a
process of its own, so that its peak memory is its own; methods take turns within a round. The kernels are compared,
and the difference is printed beside the times. ``naive`` is a forward and a backward a region; ``shared forward`` one
forward a slice and a backward a class; both keep all gradients as rows and multiply them once. ``engine``
differentiates in batches, keeps packed rows, and expands them a layer at a time; ``in processes`` makes its rows as a
pool of workers does, in a process a thread. How far float32 alone may take a kernel is the difference of ``shared
forward, one thread``: another number of threads rounds otherwise, which decides ReLUs and maxima that are all but tied.

Operations are counted as if nothing were zero: a forward a slice, a backward of activations and the products of the
weights a region, half of the symmetric kernel. The ceiling is PyTorch's float32 matrix product (`@`) in the same run; a
share of more than 1 is possible where zeros are left out, or where the engine takes oneDNN's product, whose rate then
stands beside it.
"""

import argparse
import copy
import json
import mmap
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ray_tracin.arithmetic import arithmetic, inner_products, multiply, prefers_onednn, return_freed_memory
from ray_tracin.config import ModelConfig
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.influence import EXPANDED_VALUES, tile_kernel
from ray_tracin.regions import region_scores
from ray_tracin.rounding import RowFormat
from ray_tracin.unet import HEAD, build_unet
from ray_tracin.vocabulary import Precision, RowDtype, ranges

CLASSES, MODALITIES = 3, 4
CEILING_ROWS = {"cpu": 2048, "cuda": 8192}
Problem = tuple[nn.Module, Tensor, Tensor, Tensor]


def make_problem(slices: int, width: int, size: int) -> Problem:
    """A network in eval mode with lived-in statistics, smooth random slices, lesions, and regions around their parts.

    Lesions are of the size of gliomas on BraTS slices: boxes of a hundredth to a sixth of the slice a class.
    """
    torch.manual_seed(0)
    network = build_unet(ModelConfig(width=width), MODALITIES, CLASSES, seed=0)
    images = 3 * nn.functional.avg_pool2d(torch.randn(slices, MODALITIES, size, size), 5, 1, 2)
    labels = lesions(slices, size)
    truth = torch.stack([labels == class_id for class_id in range(1, CLASSES + 1)], 1)
    masks = nn.functional.max_pool2d(truth.float(), 3, 1, 1) > 0
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(images[:8])
    return network.eval(), images, labels, masks


def lesions(slices: int, size: int) -> Tensor:
    """A lesion a slice as labels: a necrotic core (1) in an enhancing rim (3) in an oedema (2), all ellipses."""
    axis = (torch.arange(size) + 0.5) / size
    centre, radius = 0.3 + 0.4 * torch.rand(2, slices, 1, 1), 0.08 + 0.12 * torch.rand(2, slices, 1, 1)
    distance = ((axis[:, None] - centre[0]) / radius[0]).square() + ((axis - centre[1]) / radius[1]).square()
    labels = torch.zeros(slices, size, size, dtype=torch.uint8)
    for reach, label in ((1.0, 2), (0.45, 3), (0.2, 1)):
        labels[distance < reach] = label
    return labels


def naive(problem: Problem) -> Tensor:
    """A forward and a backward a region; all rows; one product."""
    network, images, labels, masks = problem
    parameters, rows = _dense_rows(problem)
    for position in range(len(images)):
        one = slice(position, position + 1)
        for class_id in range(CLASSES):
            score = region_scores(network(images[one]), labels[one], masks[one])[0, class_id]
            _write(rows[position * CLASSES + class_id], torch.autograd.grad(score, parameters))
    return _gram(rows)


def shared_forward(problem: Problem) -> Tensor:
    """One forward a slice and a backward a class; all rows; one product."""
    return _gram(_shared_rows(problem))


def on_one_thread(problem: Problem) -> Tensor:
    """`shared_forward`, whose rows are made on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = _shared_rows(problem)
    torch.set_num_threads(threads)
    return _gram(rows)


def _shared_rows(problem: Problem) -> Tensor:
    network, images, labels, masks = problem
    parameters, rows = _dense_rows(problem)
    for position in range(len(images)):
        one = slice(position, position + 1)
        scores = region_scores(network(images[one]), labels[one], masks[one])[0]
        for class_id in range(CLASSES):
            parts = torch.autograd.grad(scores[class_id], parameters, retain_graph=class_id + 1 < CLASSES)
            _write(rows[position * CLASSES + class_id], parts)
    return rows


def _dense_rows(problem: Problem) -> tuple[list[nn.Parameter], Tensor]:
    """The parameters, and room for a gradient a region."""
    network, images, *_ = problem
    parameters = list(network.parameters())
    columns = sum(parameter.numel() for parameter in parameters)
    return parameters, images.new_empty((len(images) * CLASSES, columns))


def _write(row: Tensor, parts: Sequence[Tensor]) -> None:
    torch.cat([part.flatten() for part in parts], out=row)


def in_float64(problem: Problem) -> Tensor:
    """`shared_forward` of the network and the images in float64."""
    network, images, labels, masks = problem
    return shared_forward((copy.deepcopy(network).double(), images.double(), labels, masks))


def _gram(rows: Tensor) -> Tensor:
    # One product over millions of columns would lose what is compared to 1e-5: sums of parts are float64.
    total = sum((part @ part.T).double() for part in rows.split(1 << 16, dim=1))
    assert isinstance(total, Tensor)
    return total.reshape(len(rows) // CLASSES, CLASSES, -1, CLASSES).permute(1, 0, 3, 2)


class Rows:
    """Makes the packed rows of a problem's slices on the device of its network, wherever the slices are."""

    def __init__(self, problem: Problem, batch: int, dtype: RowDtype, precision: Precision) -> None:
        network, self._images, self._labels, self._masks = problem
        self.device = next(network.parameters()).device
        self._batch = batch
        self._differentiator = RegionDifferentiator(
            network,
            head=HEAD,
            parameters="all",
            example=self._images[0].to(self.device),
            classes=CLASSES,
            precision=precision,
        )
        self.form = RowFormat(self._differentiator.layout, dtype)

    def __call__(self, start: int, stop: int) -> Tensor:
        """The rows of a range of slices, as they are kept."""
        rows = self.form.room(stop - start, self.device)
        self.fill(rows, start)
        return rows

    def fill(self, rows: Tensor, start: int) -> None:
        """Writes the rows of the slices from some position on, as they are kept."""
        for first, last in ranges(len(rows), self._batch):
            some = slice(start + first, start + last)
            images, labels, masks = (part[some].to(self.device) for part in (self._images, self._labels, self._masks))
            self._differentiator.stream(images, labels, masks, partial(self.form.write, rows[first:last]))
        return_freed_memory()


def engine(problem: Problem, batch: int = 16, dtype: RowDtype = "float32", precision: Precision = "float32") -> Tensor:
    """Packed rows in batches, then the kernel a layer at a time."""
    make = Rows(problem, batch, dtype, precision)
    return _kernel(make, make(0, len(problem[1])), precision)


def _kernel(make: Rows, rows: Tensor, precision: Precision = "float32") -> Tensor:
    chunk = EXPANDED_VALUES[make.device.type]
    read = partial(make.form.read, rows)
    return tile_kernel(make.form.layout, read, None, chunk_values=chunk, precision=precision)[0]


def in_processes(problem: Problem, batch: int = 16, dtype: RowDtype = "float16") -> tuple[Tensor, int]:
    """`engine`, its rows made in a process a thread; and what these processes add to their memory together, in bytes.

    A worker is forked once its rows have room in memory that all share; so it begins with the network and the slices.
    """
    make = Rows(problem, batch, dtype, "float32")
    if make.device.type != "cpu":
        raise ValueError(f"expected a network on the CPU, whose threads get a process each, got one on {make.device}")
    count, fork = len(problem[1]), get_context("fork")
    room = mmap.mmap(-1, count * make.form.row_bytes)
    rows = torch.frombuffer(room, dtype=make.form.room(0, make.device).dtype).view(count, make.form.words)
    parts = list(ranges(count, -(-count // torch.get_num_threads())))
    peaks = fork.Array("q", len(parts))

    def work(number: int, start: int, stop: int) -> None:
        torch.set_num_threads(1)
        before = peak_bytes(make.device)
        make.fill(rows[start:stop], start)
        peaks[number] = peak_bytes(make.device) - before

    workers = [fork.Process(target=work, args=(number, *part)) for number, part in enumerate(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"a worker failed: exit codes {[worker.exitcode for worker in workers]}")
    return _kernel(make, rows), sum(peaks[:])


Method = Callable[[Problem, int], Tensor | tuple[Tensor, int]]
"""The kernel, and where other processes made its rows, what these added to their memory."""
METHODS: dict[str, Method] = {
    "float64": lambda problem, _: in_float64(problem),
    "naive": lambda problem, _: naive(problem),
    "shared forward": lambda problem, _: shared_forward(problem),
    "shared forward, one thread": lambda problem, _: on_one_thread(problem),
    "engine": engine,
    "engine, float16 rows": partial(engine, dtype="float16"),
    "engine, float16 rows, in processes": in_processes,
    "engine, bfloat16 rows": partial(engine, dtype="bfloat16"),
    "engine, tf32": partial(engine, precision="tf32"),
    "engine, bfloat16": partial(engine, dtype="bfloat16", precision="bfloat16"),
}
DEFAULT = ["naive", "shared forward", "engine", "engine, float16 rows", "engine, float16 rows, in processes"]
SIZES = ("slices", "width", "size", "threads", "batch", "device")


def measure(method: str, options: argparse.Namespace, kernel: Path) -> dict[str, float]:
    """Seconds, peak bytes and the ceiling beside a method, in a process of its own; its kernel goes to the file."""
    sizes = [f"--{name}={getattr(options, name)}" for name in SIZES]
    command = [sys.executable, __file__, *sizes, f"--method={method}", f"--kernel={kernel}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def run_method(options: argparse.Namespace) -> None:
    """What the process of a method does."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    network, images, labels, masks = make_problem(options.slices, options.width, options.size)
    problem = network.to(device), images.to(device), labels.to(device), masks.to(device)
    ceiling = matmul_rate(device)
    work = METHODS[options.method]
    with arithmetic():
        if device.type == "cuda":
            # Loads what the libraries load when they are first used, seconds of it.
            some = slice(0, options.batch)
            work((network, problem[1][some], problem[2][some], problem[3][some]), options.batch)
            torch.cuda.reset_peak_memory_stats(device)
        before = peak_bytes(device)
        started = time.perf_counter()
        found = work(problem, options.batch)
    kernel, elsewhere = found if isinstance(found, tuple) else (found, 0)
    kernel = kernel.cpu()
    seconds = time.perf_counter() - started
    np.save(options.kernel, kernel.double().numpy())
    # Workers have ended when the kernel begins.
    peak = max(elsewhere, peak_bytes(device) - before)
    print(json.dumps({"seconds": seconds, "peak": peak, "ceiling": ceiling}))


def matmul_rate(device: torch.device, precision: Precision = "float32") -> float:
    """Operations a second of PyTorch's product of square matrices, of operands of a precision; the best of five."""
    return _rate(device, precision, partial(multiply, precision=precision) if precision == "bfloat16" else _at)


def _at(left: Tensor, right: Tensor) -> Tensor:
    return left @ right.mT


def _rate(device: torch.device, precision: Precision, product: Callable[[Tensor, Tensor], Tensor]) -> float:
    side = CEILING_ROWS[device.type]
    matrix = torch.randn(side, side, device=device)
    if precision == "bfloat16":
        matrix = matrix.bfloat16()
    spent = []
    with arithmetic(precision):
        for _ in range(5):
            started = time.perf_counter()
            float(product(matrix, matrix)[0, 0])
            spent.append(time.perf_counter() - started)
    return 2 * side**3 / min(spent)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: of a GPU what tensors took, else the resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def operations(options: argparse.Namespace) -> tuple[tuple[float, float], int]:
    """What passes and the exact kernel take if no zero is left out, and the values of one dense row."""
    network = build_unet(ModelConfig(width=options.width), MODALITIES, CLASSES, seed=0).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros((1, MODALITIES, options.size, options.size), device="meta"))
    columns = sum(parameter.numel() for parameter in network.parameters())
    passes = options.slices * counter.get_total_flops() * (1 + 2 * CLASSES)
    return (passes, columns * (options.slices * CLASSES) ** 2), columns


def compare(options: argparse.Namespace) -> str:
    """The table: for each method the median time, rate, share of the ceiling, ratios, peak memory, and difference."""
    names = [name for name in METHODS if name in options.methods]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    kernels: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in names:
                path = Path(folder) / "kernel.npy"
                figures[name].append(measure(name, options, path))
                kernels[name] = np.load(path)
    parts, columns = operations(options)
    flops = sum(parts)
    dense = options.slices * CLASSES * columns * 4
    ceiling = statistics.median(figure["ceiling"] for measured in figures.values() for figure in measured)
    onednn = ""
    if options.device == "cpu" and prefers_onednn():
        torch.set_num_threads(options.threads)
        onednn = f", oneDNN's {_rate(torch.device('cpu'), 'float32', inner_products) / 1e9:,.0f}"
    lines = [
        f"{options.slices} slices × {CLASSES} classes, UNet of width {options.width} at {options.size}² "
        f"({columns:,} parameters), batches of {options.batch}, {machine(options)}, median of {options.rounds}. "
        f"{flops / 1e12:.2f} TFLOP; float32 matrix product {ceiling / 1e9:,.0f} GFLOP/s{onednn}; dense rows "
        f"{dense / 2**20:,.0f} MiB.",
        "",
        "| method | seconds | GFLOP/s | of the product's rate | naive ÷ it | shared forward ÷ it | peak memory, MiB | "
        "of dense rows | relative difference | from one thread's |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *_rows(figures, kernels, flops, ceiling, dense),
    ]
    return "\n".join(lines)


def machine(options: argparse.Namespace) -> str:
    """What was measured on, in words."""
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU threads"
    return f"{where}, torch {torch.__version__}, Python {platform.python_version()}"


def _rows(
    figures: dict[str, list[dict[str, float]]],
    kernels: dict[str, np.ndarray],
    flops: float,
    ceiling: float,
    dense: int,
) -> Sequence[str]:
    seconds = {name: statistics.median(one["seconds"] for one in measured) for name, measured in figures.items()}
    references = [next(iter(kernels.values())), kernels.get("shared forward, one thread")]
    lines = []
    for name, measured in figures.items():
        rate = flops / seconds[name]
        peak = max(one["peak"] for one in measured)
        ratios = [
            f"{seconds[base] / seconds[name]:.2f}" if base in seconds else "" for base in ("naive", "shared forward")
        ]
        differences = ["" if one is None else f"{relative_difference(kernels[name], one):.1e}" for one in references]
        lines.append(
            f"| {name} | {seconds[name]:.2f} | {rate / 1e9:,.0f} | {rate / ceiling:.0%} | {' | '.join(ratios)} | "
            f"{peak / 2**20:,.0f} | {peak / dense:.2f} | {' | '.join(differences)} |"
        )
    return lines


def relative_difference(kernel: np.ndarray, reference: np.ndarray) -> float:
    """Of a kernel from another, in the Frobenius norm."""
    return float(np.linalg.norm(kernel - reference) / np.linalg.norm(reference))


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=96)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="slices that the engine differentiates at once")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS])
    parser.add_argument("--method", choices=[*METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--kernel", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Only a CPU's threads have processes instead.
    options.methods = options.methods or (DEFAULT if options.device == "cpu" else DEFAULT[:-1])
    if options.method:
        run_method(options)
    else:
        print(compare(options))


if __name__ == "__main__":
    main()
