"""captum 0.9: TracInCP on the rows, one checkpoint of learning rate 1.

``TracInCPFast`` and ``TracInCPFastRandProj`` can't take part: they know the last fully connected layer alone.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from captum.influence import TracInCP
from torch import Tensor
from torch.utils.data import DataLoader

from adapters.rows import Problem, as_kernel, examples, row_scores

BATCH = 1
"""Its default path walks the graph of the whole batch for every example: one at a time is the fastest."""
VECTORISED_BATCH = 24


def influence(problem: Problem) -> Tensor:
    """Its own answer, ``TracInCP.influence``: the gradients of both sides, then their products."""
    with tempfile.TemporaryDirectory() as folder:
        rows = examples(problem)
        method = _method(problem, rows, folder, loss_fn=row_scores, batch_size=BATCH)
        return as_kernel(method.influence(DataLoader(rows, batch_size=BATCH)), problem[3].shape[1])


def gradients(problem: Problem) -> Tensor:
    """Its gradients alone (``compute_intermediate_quantities``), multiplied by one product that isn't captum's."""
    with tempfile.TemporaryDirectory() as folder:
        rows = examples(problem)
        method = _method(problem, rows, folder, loss_fn=row_scores, batch_size=BATCH)
        found = method.compute_intermediate_quantities(DataLoader(rows, batch_size=BATCH))
        return as_kernel(found @ found.T, problem[3].shape[1])


def vectorised(problem: Problem) -> Tensor:
    """Its batched path, which takes a sum over examples. It leaves out all but Conv2d and Linear without a word."""
    with tempfile.TemporaryDirectory() as folder:
        rows = examples(problem)
        options = {"loss_fn": _total, "batch_size": VECTORISED_BATCH, "sample_wise_grads_per_batch": True}
        method = _method(problem, rows, folder, **options)
        return as_kernel(method.influence(DataLoader(rows, batch_size=VECTORISED_BATCH)), problem[3].shape[1])


def _total(logits: Tensor, targets: Tensor) -> Tensor:
    return row_scores(logits, targets).sum()


def _method(problem: Problem, rows: Any, folder: str, **options: Any) -> TracInCP:
    checkpoint = Path(folder) / "checkpoint.pt"
    torch.save(problem[0].state_dict(), checkpoint)
    return TracInCP(problem[0], rows, [str(checkpoint)], **options)
