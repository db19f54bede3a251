"""What the engine must compute, in the most literal way: float64, a slice alone, a class at a time, autograd, loops.

Shares no code with the package.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def dice(logits: Tensor, labels: Tensor, mask: Tensor, class_id: int) -> Tensor:
    """2 Σ P·GT / Σ (P + GT) over the pixels of a mask, for one slice: (channel, *space), (*space), (*space)."""
    exponentials = torch.exp(logits - logits.amax(0))
    probability = (exponentials[class_id] / exponentials.sum(0))[mask]
    truth = (labels[mask] == class_id).double()
    return 2 * (probability * truth).sum() / (probability + truth).sum()


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def gradients(
    model: nn.Module, names: Sequence[str], images: Tensor, labels: Tensor, masks: Tensor
) -> dict[str, Tensor]:
    """(slice, class, *parameter) for every parameter; 0 for regions without a pixel."""
    model = double(model)
    parameters = {name: value for name, value in model.named_parameters() if name in names}
    slices, classes = masks.shape[:2]
    result = {name: torch.zeros(slices, classes, *value.shape).double() for name, value in parameters.items()}
    for position in range(slices):
        for column in range(classes):
            if not masks[position, column].any():
                continue
            model.zero_grad()
            logits = model(images[position : position + 1].double().clone())[0]
            dice(logits, labels[position], masks[position, column], column + 1).backward()
            for name, value in parameters.items():
                if value.grad is not None:
                    result[name][position, column] = value.grad.to_dense()
    return result


def kernel(query: dict[str, Tensor], train: dict[str, Tensor]) -> Tensor:
    """⟨∇D_j(z), ∇D_i(z')⟩ as (class, query, class, train), a pair at a time."""
    q, t = (torch.cat([value.flatten(2) for value in side.values()], 2) for side in (query, train))
    result = torch.zeros(q.shape[1], q.shape[0], t.shape[1], t.shape[0]).double()
    for i in range(q.shape[1]):
        for n in range(q.shape[0]):
            for j in range(t.shape[1]):
                for m in range(t.shape[0]):
                    result[i, n, j, m] = torch.dot(q[n, i], t[m, j])
    return result


def difference(got: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((got.double() - expected).norm() / expected.norm())
