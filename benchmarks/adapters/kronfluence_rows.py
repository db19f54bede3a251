"""kronfluence 1.0: pairwise scores with the identity in place of a curvature, all queries resident at once.

It tracks Conv2d and Linear, and leaves out every other layer without a word; transposed convolutions and batch
normalisation are added here the way it offers, as `TrackedModule` subclasses.
"""

import logging
import tempfile
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.module.tracked_module import TrackedModule
from kronfluence.task import Task
from torch import Tensor, nn

from adapters.rows import Problem, as_kernel, examples, row_scores

TRAIN_BATCH = 24


class DiceTask(Task):
    """The sum of the regions' scores, for queries and train alike."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Of a batch of examples."""
        images, targets = batch
        return row_scores(model(images), targets).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The same."""
        return self.compute_train_loss(batch, model)


class _RowModule(TrackedModule):
    """Layers whose gradient of an example is made whole; without factors of a curvature."""

    def get_flattened_activation(self, input_activation: Tensor) -> Any:
        raise NotImplementedError("the identity strategy needs no factors")

    def get_flattened_gradient(self, output_gradient: Tensor) -> Any:
        raise NotImplementedError("the identity strategy needs no factors")

    def compute_per_sample_gradient(self, input_activation: Tensor, output_gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_summed_gradient(self, input_activation: Tensor, output_gradient: Tensor) -> Tensor:
        return self.compute_per_sample_gradient(input_activation, output_gradient).sum(0, keepdim=True)

    def compute_pairwise_score(
        self, preconditioned_gradient: Tensor, input_activation: Tensor, output_gradient: Tensor
    ) -> Tensor:
        rows = self.compute_per_sample_gradient(input_activation, output_gradient)
        return torch.einsum("qio,tio->qt", preconditioned_gradient, rows)


def add_layers() -> None:
    """Teach kronfluence the UNet's other layers; its registry fills as the classes are made."""

    class TrackedUpsampling(_RowModule, module_type=nn.ConvTranspose2d):  # type: ignore[call-arg]
        """A transposed convolution whose kernel is its stride."""

        def compute_per_sample_gradient(self, input_activation: Tensor, output_gradient: Tensor) -> Tensor:
            module = self.original_module
            assert module.kernel_size == module.stride
            assert module.padding == (0, 0)
            size = module.kernel_size[0]
            patches = output_gradient.unflatten(3, (-1, size)).unflatten(2, (-1, size))
            weight = torch.einsum("bihw,bohkwl->biokl", input_activation, patches).flatten(1)
            parts = [weight] if module.bias is None else [weight, output_gradient.sum((2, 3))]
            return torch.cat(parts, 1).unsqueeze(1)

    class TrackedNormalisation(_RowModule, module_type=nn.BatchNorm2d):  # type: ignore[call-arg]
        """A batch normalisation in eval mode."""

        def compute_per_sample_gradient(self, input_activation: Tensor, output_gradient: Tensor) -> Tensor:
            module = self.original_module
            scaled = nn.functional.batch_norm(input_activation, module.running_mean, module.running_var, eps=module.eps)
            sums = [(scaled * output_gradient).sum((2, 3)), output_gradient.sum((2, 3))]
            return torch.cat(sums, 1).unsqueeze(1)


def as_shipped(problem: Problem) -> Tensor:
    """Its own layers: convolutions alone, of a UNet."""
    logging.disable(logging.CRITICAL)
    rows = examples(problem)
    task = DiceTask()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            analysis_name="peers",
            model=prepare_model(problem[0], task),
            task=task,
            cpu=True,
            output_dir=folder,
            disable_tqdm=True,
        )
        factors = FactorArguments(strategy="identity")
        analyzer.fit_all_factors(
            factors_name="identity", dataset=rows, factor_args=factors, per_device_batch_size=TRAIN_BATCH
        )
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="identity",
            query_dataset=rows,
            train_dataset=rows,
            per_device_query_batch_size=len(rows),
            per_device_train_batch_size=TRAIN_BATCH,
            score_args=ScoreArguments(),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return as_kernel(scores, problem[3].shape[1])


def completed(problem: Problem) -> Tensor:
    """With the two layers that it lacks."""
    add_layers()
    return as_shipped(problem)
