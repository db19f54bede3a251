"""Seconds and peak memory of region gradients and their kernel: this engine against plain autograd, on the same rows.

    python benchmarks/engine.py --slices 24 --width 16 --size 96 --rounds 3

Every method runs in a process of its own, so that its peak memory is its own; methods take turns within a round. The
kernels are compared, and the difference is printed beside the times. ``naive`` is a forward and a backward a region;
``shared forward`` one forward a slice and a backward a class; both keep all gradients as rows and multiply them once.
``engine`` differentiates in batches, keeps packed rows, and expands them a layer at a time.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ray_tracin.config import ModelConfig
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.influence import tile_kernel
from ray_tracin.layers import Segment
from ray_tracin.regions import region_scores
from ray_tracin.unet import HEAD, build_unet

CLASSES, MODALITIES = 3, 4
CHUNK_VALUES = 1 << 24
BATCH = 8
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
            network(images[:BATCH])
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
    parameters = list(network.parameters())
    rows = []
    for position in range(len(images)):
        one = slice(position, position + 1)
        for class_id in range(CLASSES):
            score = region_scores(network(images[one]), labels[one], masks[one])[0, class_id]
            rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(score, parameters)]))
    return _gram(torch.stack(rows))


def shared_forward(problem: Problem) -> Tensor:
    """One forward a slice and a backward a class; all rows; one product."""
    network, images, labels, masks = problem
    parameters = list(network.parameters())
    rows = []
    for position in range(len(images)):
        one = slice(position, position + 1)
        scores = region_scores(network(images[one]), labels[one], masks[one])[0]
        for class_id in range(CLASSES):
            parts = torch.autograd.grad(scores[class_id], parameters, retain_graph=class_id + 1 < CLASSES)
            rows.append(torch.cat([part.flatten() for part in parts]))
    return _gram(torch.stack(rows))


def _gram(rows: Tensor) -> Tensor:
    return (rows @ rows.T).reshape(len(rows) // CLASSES, CLASSES, -1, CLASSES).permute(1, 0, 3, 2)


def engine(problem: Problem, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed rows in batches, then the kernel a layer at a time."""
    network, images, labels, masks = problem
    differentiator = RegionDifferentiator(network, head=HEAD, parameters="all", example=images[0], classes=CLASSES)
    batches = zip(images.split(BATCH), labels.split(BATCH), masks.split(BATCH), strict=True)
    packed = torch.cat([differentiator.differentiate(*batch).values.to(dtype) for batch in batches])

    def read(segment: Segment) -> Tensor:
        return packed[:, segment.offset : segment.stop]

    kernel, _ = tile_kernel(differentiator.layout, read, None, chunk_values=CHUNK_VALUES)
    return kernel


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "naive": naive,
    "shared forward": shared_forward,
    "engine": engine,
    "engine, bfloat16 rows": partial(engine, dtype=torch.bfloat16),
}


def measure(method: str, options: argparse.Namespace, kernel: Path) -> dict[str, float]:
    """Seconds and peak bytes of a method, in a process of its own; its kernel goes to the file."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("slices", "width", "size", "threads")]
    command = [sys.executable, __file__, *sizes, f"--method={method}", f"--kernel={kernel}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def run_method(options: argparse.Namespace) -> None:
    """What the process of a method does."""
    torch.set_num_threads(options.threads)
    problem = make_problem(options.slices, options.width, options.size)
    before = _peak()
    started = time.perf_counter()
    kernel = METHODS[options.method](problem)
    seconds = time.perf_counter() - started
    np.save(options.kernel, kernel.double().numpy())
    print(json.dumps({"seconds": seconds, "peak": _peak() - before}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(options: argparse.Namespace) -> str:
    """The table: for each method the median time, its ratio to the naive one, peak memory, and the difference."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    kernels: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in METHODS:
                path = Path(folder) / "kernel.npy"
                figures[name].append(measure(name, options, path))
                kernels[name] = np.load(path)
    lines = [
        f"{options.slices} slices × {CLASSES} classes, UNet of width {options.width} at {options.size}², "
        f"{options.threads} threads, median of {options.rounds}; torch {torch.__version__}, {platform.processor()} "
        f"{platform.machine()}, Python {platform.python_version()}",
        "",
        "| method | seconds | naive ÷ it | peak memory, MiB | relative difference |",
        "|---|---|---|---|---|",
    ]
    reference = kernels["naive"]
    base = statistics.median(figure["seconds"] for figure in figures["naive"])
    for name, measured in figures.items():
        seconds = statistics.median(figure["seconds"] for figure in measured)
        peak = max(figure["peak"] for figure in measured) / 2**20
        difference = np.linalg.norm(kernels[name] - reference) / np.linalg.norm(reference)
        lines.append(f"| {name} | {seconds:.2f} | {base / seconds:.2f} | {peak:.0f} | {difference:.1e} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=[*METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--kernel", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        run_method(options)
    else:
        print(compare(options))


if __name__ == "__main__":
    main()
