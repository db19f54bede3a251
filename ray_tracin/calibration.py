"""How fast a machine computes, writes and reads: what turns a plan's counts into seconds.

`NOMINAL` rates decide between sources where nothing is measured; `calibrate` measures this machine in about five
seconds, on the network of the run (narrowed if it is too large for that) and in the place where the run will be.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_tracin.arithmetic import arithmetic, multiply
from ray_tracin.config import ModelConfig, RunConfig
from ray_tracin.gradients import RegionDifferentiator
from ray_tracin.objects import Objects
from ray_tracin.unet import HEAD, build_unet

SECONDS = 1.2
"""Of every measurement; there are four."""
PASS_FLOPS = {"cpu": 5e10, "cuda": 2e13}
"""Of one slice, above which the network is narrowed until it has less."""
PRODUCT_ROWS = {"cpu": 1024, "cuda": 6144}
PRODUCT_COLUMNS = 8192
FILE_BYTES = 32 << 20


@dataclass(frozen=True)
class Rates:
    """What one worker does in a second."""

    passes: float
    """Operations of forward and backward passes."""
    products: float
    """Operations of inner products of gradients."""
    written: float
    """Bytes into the run."""
    read: float
    """Bytes out of the run."""


NOMINAL = {
    "cpu": Rates(passes=4e10, products=8e10, written=2e8, read=5e8),
    "cuda": Rates(passes=3e13, products=5e13, written=5e8, read=1e9),
}
"""Of one core of a server, and of a data centre's GPU with float32 operands: orders of magnitude."""


def calibrate(config: RunConfig, classes: int, uri: str) -> Rates:
    """The rates of this machine, of the threads that a worker has, and of the storage of a run.

    Leaves no file behind. On a machine without the accelerator that the workers have, it is this machine's rates.
    """
    device = torch.device("cuda" if config.resources.device != "cpu" and torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.resources.threads)
    try:
        written, read = _storage_rates(Objects(uri))
        return Rates(_pass_rate(config, classes, device), _product_rate(config, device), written, read)
    finally:
        torch.set_num_threads(threads)


def _pass_rate(config: RunConfig, classes: int, device: torch.device) -> float:
    settings, size, channels = config.model, config.data.size, len(config.data.modalities)
    while (flops := _pass_flops(settings, channels, classes, size)) > PASS_FLOPS[device.type] and settings.width > 8:
        settings = settings.model_copy(update={"width": settings.width // 2})
    network = build_unet(settings, channels, classes, config.seed).to(device).eval()
    image = torch.zeros((channels, size, size), device=device)
    engine = RegionDifferentiator(
        network, head=HEAD, parameters="all", example=image, classes=classes, precision=config.gradients.precision
    )
    # A GPU is not busy with one slice.
    count = config.resources.batch_slices if device.type == "cuda" else 1
    images = image.expand(count, -1, -1, -1)
    labels = torch.zeros((count, size, size), dtype=torch.uint8)
    masks = torch.zeros((count, classes, size, size), dtype=torch.bool)
    # A tenth of the slice, as a tumour is.
    centre = slice(int(0.35 * size), max(int(0.65 * size), int(0.35 * size) + 1))
    masks[..., centre, centre] = True
    return count * flops / _seconds(lambda: engine.differentiate(images, labels, masks), device)


def _pass_flops(settings: ModelConfig, channels: int, classes: int, size: int) -> float:
    """Of one slice: a forward, and for every class a backward of activations and the products of the weights."""
    network = build_unet(settings, channels, classes, 0).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros((1, channels, size, size), device="meta"))
    return float(counter.get_total_flops() * (1 + 2 * classes))


def _product_rate(config: RunConfig, device: torch.device) -> float:
    rows = torch.randn((PRODUCT_ROWS[device.type], PRODUCT_COLUMNS), device=device)
    precision = config.gradients.precision
    with arithmetic(precision):
        return 2 * len(rows) ** 2 * PRODUCT_COLUMNS / _seconds(lambda: multiply(rows, rows, precision), device)


def _storage_rates(objects: Objects) -> tuple[float, float]:
    path = f".calibration-{uuid.uuid4().hex}"
    content = torch.randint(0, 256, (FILE_BYTES,), dtype=torch.uint8).numpy().tobytes()
    cpu = torch.device("cpu")
    try:
        written = _seconds(lambda: objects.put(path, content), cpu)
        read = _seconds(lambda: objects.get(path), cpu)
    finally:
        objects.delete([path])
    return FILE_BYTES / written, FILE_BYTES / read


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the fastest call within the time of a measurement, the first one left out where there is time for more."""
    spent: list[float] = []
    began = time.perf_counter()
    while len(spent) < 2 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - start)
    return min(spent[1:])
