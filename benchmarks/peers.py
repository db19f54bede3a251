"""The kernel of region gradients by this engine, by other libraries and by plain autograd: same network, rows, result.

    pip install -e '.[peers]'
    python benchmarks/peers.py --width 16 --size 96 --slices 24

Every method runs in a process of its own, so that its peak memory is its own; methods take turns within a round. A time
counts all from network and slices to the kernel, imports left out. The relative difference from the engine's kernel
stands beside every time: a ratio between unequal results is none. Methods that take minutes are measured once.
What each library needed to take part is in ``benchmarks/adapters/``, and in the table.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from engine import make_problem, peak_bytes, relative_difference

SAME = 1e-5
"""Relative difference up to which two kernels count as the same."""
NOT_THE_RESULT = "not the result"


@dataclass(frozen=True)
class Method:
    """A way to the kernel: where its function is, which package it shows, and what it needed."""

    name: str
    module: str
    function: str
    package: str | None = None
    adapter: str = ""
    slow: bool = False


METHODS = (
    Method("engine", "engine", "engine"),
    Method("naive loop", "engine", "naive", adapter="a forward and a backward a region, rows, one product"),
    Method("shared forward", "engine", "shared_forward", adapter="a forward a slice, a backward a region"),
    Method("captum", "adapters.captum_rows", "influence", "captum", "TracInCP.influence; a row a region"),
    Method("captum's gradients", "adapters.captum_rows", "gradients", "captum", "multiplied by one product of ours"),
    Method("captum, vectorised", "adapters.captum_rows", "vectorised", "captum", "covers Conv2d and Linear alone"),
    Method("kronfluence", "adapters.kronfluence_rows", "as_shipped", "kronfluence", "covers Conv2d and Linear alone"),
    Method(
        "kronfluence + layers",
        "adapters.kronfluence_rows",
        "completed",
        "kronfluence",
        "ConvTranspose2d and BatchNorm2d added; a row a region",
    ),
    Method("TRAK, no projection", "adapters.trak_rows", "influence", "traker", "score computer added; a row a region"),
    Method(
        "dattri",
        "adapters.dattri_rows",
        "influence",
        "dattri",
        "projection turned off by an attribute; a row a region",
        slow=True,
    ),
)


@dataclass(frozen=True)
class Figures:
    """What a method took: seconds of every round, the largest peak in bytes, its kernel."""

    seconds: tuple[float, ...]
    peak: float
    kernel: np.ndarray


def run_method(method: Method, options: argparse.Namespace) -> None:
    """What the process of a method does: time it, save its kernel, print the figures."""
    torch.set_num_threads(options.threads)
    problem = make_problem(options.slices, options.width, options.size)
    function: Callable[..., torch.Tensor] = getattr(import_module(method.module), method.function)
    cpu = torch.device("cpu")
    before = peak_bytes(cpu)
    started = time.perf_counter()
    kernel = function(problem)
    seconds = time.perf_counter() - started
    np.save(options.kernel, kernel.double().numpy())
    print(json.dumps({"seconds": seconds, "peak": peak_bytes(cpu) - before}))


def measure(method: Method, options: argparse.Namespace, folder: Path) -> Figures:
    """One round of a method, in a process of its own."""
    kernel = folder / "kernel.npy"
    sizes = [f"--{name}={getattr(options, name)}" for name in ("slices", "width", "size", "threads")]
    command = [sys.executable, __file__, *sizes, f"--method={method.name}", f"--kernel={kernel}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method.name} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Figures((found["seconds"],), found["peak"], np.load(kernel))


def measure_all(options: argparse.Namespace) -> dict[str, Figures]:
    """All installed methods, interleaved; slow ones in the first round alone."""
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for method in METHODS:
                if method.name not in options.methods or _installed(method) is None or (method.slow and turn):
                    continue
                new = measure(method, options, Path(folder))
                old = figures.get(method.name)
                seconds = (*old.seconds, *new.seconds) if old else new.seconds
                figures[method.name] = Figures(seconds, max(new.peak, old.peak if old else 0), new.kernel)
                print(f"round {turn + 1}: {method.name} {new.seconds[0]:.2f} s", file=sys.stderr, flush=True)
    return figures


def _installed(method: Method) -> str | None:
    """The version of the method's package; empty where it needs none, None where it isn't installed."""
    if method.package is None:
        return ""
    try:
        return version(method.package)
    except PackageNotFoundError:
        return None


def compare(options: argparse.Namespace) -> str:
    """The table: for each method median seconds, their ratio to the engine's, peak memory, and the difference."""
    figures = measure_all(options)
    lines = [
        f"{options.slices} slices × {figures['engine'].kernel.shape[0]} classes, UNet of width {options.width} at "
        f"{options.size}², {options.threads} threads, median of {options.rounds} rounds; torch "
        f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        "",
        "| method | version | seconds | ÷ engine | peak memory, MiB | relative difference | what it needed |",
        "|---|---|---|---|---|---|---|",
        *(_line(method, figures) for method in METHODS if method.name in options.methods),
    ]
    return "\n".join(lines)


def _line(method: Method, figures: dict[str, Figures]) -> str:
    if method.name not in figures:
        return f"| {method.name} | not measured | | | | | |"
    mine, engine = figures[method.name], figures["engine"]
    seconds = statistics.median(mine.seconds)
    difference = relative_difference(mine.kernel, engine.kernel)
    ratio = f"{seconds / statistics.median(engine.seconds):.1f}" if difference <= SAME else NOT_THE_RESULT
    cells = (
        method.name,
        _installed(method) or "",
        f"{seconds:.2f}",
        ratio,
        f"{mine.peak / 2**20:.0f}",
        f"{difference:.1e}",
        method.adapter,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse, compare, print."""
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=names, default=names, help="the engine is always among them")
    parser.add_argument("--method", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--kernel", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.methods = {"engine", *options.methods}
    if options.method:
        run_method(next(method for method in METHODS if method.name == options.method), options)
    else:
        print(compare(options))


if __name__ == "__main__":
    main()
