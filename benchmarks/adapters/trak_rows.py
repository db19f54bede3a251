"""TRAK 0.3: its gradients by ``vmap``, without projection, and a plain product in place of its preconditioned one.

``NoOpProjector`` keeps whole rows; the score computer is five lines of this file. TRAK scales every gradient by the
square root of the number of parameters, which is undone at the end.
"""

import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import NoOpProjector
from trak.score_computers import AbstractScoreComputer

from adapters.rows import Problem, as_kernel, examples, row_scores

BATCH = 8


class DiceOutput(AbstractModelOutput):
    """The score of an example's region."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model: nn.Module, weights: Any, buffers: Any, image: Tensor, target: Tensor) -> Tensor:
        """Of one example, under vmap."""
        logits = torch.func.functional_call(model, (weights, buffers), (image.unsqueeze(0),))
        return row_scores(logits, target.unsqueeze(0)).squeeze(0)

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        """1: there is no loss beyond the score."""
        return torch.ones(len(batch[0]), 1)


class PlainProduct(AbstractScoreComputer):
    """Inner products of gradients, nothing between them."""

    def __init__(self, dtype: Any, device: Any, logging_level: Any = None, lambda_reg: float = 0.0) -> None:
        super().__init__(dtype, device)

    def get_xtx(self, grads: Tensor) -> None:
        """Not needed."""

    def get_x_xtx_inv(self, grads: Tensor, xtx: Any) -> Tensor:
        """The gradients as they are."""
        return grads

    def get_scores(self, features: Tensor, target_grads: Tensor, accumulator: Tensor) -> None:
        """Add the products."""
        accumulator += features @ target_grads.T


def influence(problem: Problem) -> Tensor:
    """Featurize, score, finalize: both sides' gradients, through its memory-mapped files."""
    logging.disable(logging.CRITICAL)
    model, rows = problem[0], examples(problem)
    size = sum(parameter.numel() for parameter in model.parameters())
    projector = NoOpProjector(grad_dim=size, proj_dim=0, seed=0, proj_type=None, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        tracer = TRAKer(
            model=model,
            task=DiceOutput(),
            train_set_size=len(rows),
            save_dir=folder,
            device="cpu",
            use_half_precision=False,
            projector=projector,
            score_computer=PlainProduct,
        )
        tracer.load_checkpoint(model.state_dict(), model_id=0)
        for batch in DataLoader(rows, batch_size=BATCH):
            tracer.featurize(batch, num_samples=len(batch[0]))
        tracer.finalize_features()
        tracer.start_scoring_checkpoint("same", model.state_dict(), 0, len(rows))
        for batch in DataLoader(rows, batch_size=BATCH):
            tracer.score(batch, num_samples=len(batch[0]))
        scores = torch.from_numpy(tracer.finalize_scores("same").copy())
    return as_kernel((scores * size).T, problem[3].shape[1])
