"""dattri 0.3: its TracIn attributor, exact.

Its constructor can't turn the random projection to 512 dimensions off, so that the attribute is set afterwards. The
train side comes in one batch, because it computes all queries' gradients anew for every batch of the train side.
"""

import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.utils.data import DataLoader

from adapters.rows import Problem, as_kernel, examples, row_scores


def influence(problem: Problem) -> Tensor:
    """``attribute`` on the same rows as train and test, by ``vmap`` over one flat vector of parameters."""
    model, rows = problem[0], examples(problem)

    def score(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        image, target = example
        logits = torch.func.functional_call(model, parameters, image.unsqueeze(0))
        return row_scores(logits, target.unsqueeze(0)).squeeze(0)

    task = AttributionTask(loss_func=score, model=model, checkpoints=model.state_dict())
    attributor = TracInAttributor(task=task, weight_list=torch.ones(1), normalized_grad=False, device="cpu")
    attributor.projector_kwargs = None
    with torch.no_grad():
        products = attributor.attribute(DataLoader(rows, batch_size=len(rows)), DataLoader(rows, batch_size=len(rows)))
    return as_kernel(products.T, problem[3].shape[1])
