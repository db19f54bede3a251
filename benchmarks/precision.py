"""How much precision the influence tensor needs: each way of multiplying, on a run's own networks and slices.

    ray-tracin demo --run demo
    python benchmarks/precision.py --run demo --slices 48

The reference is float64 throughout, a slice alone, a class at a time, by autograd: none of the engine's code. What is
compared is the sum over the run's checkpoints (eq. 6). For each precision: the relative difference in the Frobenius
norm, and row by row the rank correlation and the overlap of the 10 and 20 strongest of each side; a row's region itself
is left out of its row. TF32 needs a GPU; without one it is *emulated* by rounding the operands of the products to its
10 bits of mantissa, and accumulating in float32.
"""

import argparse
import copy
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ray_tracin.agreement import Agreement, measure_agreement
from ray_tracin.attribution import differentiator
from ray_tracin.influence import EXPANDED_VALUES, sum_checkpoints, tile_kernel, train_columns
from ray_tracin.layers import expand
from ray_tracin.rounding import RowFormat
from ray_tracin.runs import Run, open_run
from ray_tracin.vocabulary import Precision, RowDtype

SPEARMAN, OVERLAP = 0.999, 0.99
"""What a default precision has to keep: mean rank correlation, and overlap of the top 20."""
TF32_DROPPED_BITS = 13
"""Of float32's 23 bits of mantissa TF32 keeps 10."""

Batch = tuple[Tensor, Tensor, Tensor]
Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """A way to store and to multiply: the dtype of packed rows, the engine's precision, or a rounding in its place."""

    name: str
    rows: RowDtype = "float32"
    precision: Precision = "float32"
    emulated: Rounding | None = None


def as_tf32(values: Tensor) -> Tensor:
    """The values with 10 bits of mantissa, rounded to nearest, ties to even."""
    bits = values.contiguous().view(torch.int32)
    half = (1 << (TF32_DROPPED_BITS - 1)) - 1
    odd = (bits >> TF32_DROPPED_BITS) & 1
    kept = (bits + half + odd) & -(1 << TF32_DROPPED_BITS)
    return kept.view(torch.float32)


WAYS = (
    Way("float32"),
    Way("TF32 products (emulated)", emulated=as_tf32),
    Way("float16 rows, float32 products", rows="float16"),
    Way("bfloat16 rows, float32 products", rows="bfloat16"),
    Way("float32 rows, bfloat16 operands", precision="bfloat16"),
    Way("float16 rows, bfloat16 operands", rows="float16", precision="bfloat16"),
    Way("bfloat16 rows and operands", rows="bfloat16", precision="bfloat16"),
)


def reference_rows(model: nn.Module, batch: Batch) -> Tensor:
    """Gradients in float64, a row a region (class by class, slice by slice): a loop around autograd."""
    double = copy.deepcopy(model).double().eval()
    parameters = list(double.parameters())
    images, labels, masks = batch
    rows = torch.zeros(masks.shape[1], len(images), sum(value.numel() for value in parameters), dtype=torch.float64)
    for position, image in enumerate(images):
        logits = double(image[None].double())[0]
        for column, mask in enumerate(masks[position]):
            if mask.any():
                score = _dice(logits, labels[position], mask, column + 1)
                parts = torch.autograd.grad(score, parameters, retain_graph=True)
                rows[column, position] = torch.cat([part.flatten() for part in parts])
    return rows.flatten(0, 1)


def _dice(logits: Tensor, labels: Tensor, mask: Tensor, class_id: int) -> Tensor:
    probability = logits.softmax(0)[class_id][mask]
    truth = (labels[mask] == class_id).double()
    return 2 * (probability * truth).sum() / (probability + truth).sum()


def kernel_by(way: Way, run: Run, epoch: int, batch: Batch) -> Tensor:
    """The train kernel of a checkpoint (class, query, class, train) by the engine, in one way."""
    engine = differentiator(run, epoch, torch.device("cpu"))
    step = run.config.resources.batch_slices
    batches = zip(*(part.split(step) for part in batch), strict=True)
    form = RowFormat(engine.layout, way.rows)
    read = partial(form.read, torch.cat([form.keep(engine.differentiate(*part).values) for part in batches]))
    if way.emulated is None:
        return tile_kernel(engine.layout, read, None, chunk_values=EXPANDED_VALUES["cpu"], precision=way.precision)[0]
    classes = engine.layout.classes
    rows = len(batch[0]) * classes
    total = torch.zeros(rows, rows)
    for segment in engine.layout.segments:
        for chunk in expand(segment, read(segment), classes, columns=max(1, EXPANDED_VALUES["cpu"] // rows)):
            operands = way.emulated(chunk.flatten(0, 1))
            total += operands @ operands.T
    blocks: Tensor = total.unflatten(1, (-1, classes)).unflatten(0, (-1, classes))
    return blocks.permute(1, 0, 3, 2)


def chosen_slices(run: Run, count: int) -> Batch:
    """Train slices spread over the patients, as their gradients are taken in the run."""
    spread = np.linspace(0, len(run.train_slices) - 1, min(count, len(run.train_slices))).round().astype(int)
    rows = [run.train_slices[position] for position in spread]
    masks, labels = (run.store.read(f"regions.zarr/{name}")[rows] for name in ("mask", "labels"))
    return torch.from_numpy(run.images(rows)), torch.from_numpy(labels), torch.from_numpy(masks)


def influence(kernels: Sequence[Tensor], rates: Tensor, exists: Tensor) -> Tensor:
    """Eq. 6 as a matrix of regions, NaN where one doesn't exist and on the diagonal."""
    total = sum_checkpoints(torch.stack([train_columns(kernel) for kernel in kernels]), rates).flatten(0, 1)
    total = torch.where(exists[:, None] & exists[None], total, torch.nan)
    return total.fill_diagonal_(torch.nan)


def compare(run: Run, count: int) -> str:
    """The table: for each precision its agreement with float64."""
    batch = chosen_slices(run, count)
    exists = batch[2].flatten(2).any(2).T.flatten()
    epochs = run.config.influence_epochs()
    rates = run.learning_rates
    reference = torch.zeros(len(exists), len(exists), dtype=torch.float64)
    for epoch, rate in zip(epochs, rates.tolist(), strict=True):
        rows = reference_rows(run.model(epoch=epoch), batch)
        reference += rate * (rows @ rows.T)
    reference = torch.where(exists[:, None] & exists[None], reference, torch.nan).fill_diagonal_(torch.nan)
    lines = [
        f"{len(batch[0])} train slices, {int(exists.sum())} regions, {len(epochs)} checkpoints, UNet of width "
        f"{run.config.model.width} at {run.config.data.size}²; torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, CPU",
        "",
        "| precision | relative difference | rank correlation | its lowest | top 10 | top 20 | good as default |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        kernels = [kernel_by(way, run, epoch, batch) for epoch in epochs]
        lines.append(_line(way.name, measure_agreement(influence(kernels, rates, exists).double(), reference)))
    if not torch.cuda.is_available():
        lines.append("| TF32 on a GPU | not measured: no GPU | | | | | |")
    return "\n".join(lines)


def _line(name: str, found: Agreement) -> str:
    keeps = "yes" if found.spearman >= SPEARMAN and found.top_20 >= OVERLAP else "no"
    shares = (found.spearman, found.spearman_worst, found.top_10, found.top_20)
    return f"| {name} | {found.difference:.2e} | {' | '.join(f'{share:.5f}' for share in shares)} | {keeps} |"


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--slices", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(compare(open_run(options.run), options.slices))


if __name__ == "__main__":
    main()
