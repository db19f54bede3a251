"""The benchmark's regions as other libraries want them: one example a region, with a scalar for each.

None of them can take several scores of one slice, so that each slice is there once a class, and goes through the
network once a class. What a region's score needs travels in the example's target.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Problem = tuple[nn.Module, Tensor, Tensor, Tensor]
"""A network in eval mode, images, labels, and the masks of the regions."""


def examples(problem: Problem) -> TensorDataset:
    """An example a region, slice by slice: the image; and as planes, the truth of its class, its mask, its class."""
    _, images, labels, masks = problem
    classes = masks.shape[1]
    numbers = torch.arange(1, classes + 1).view(-1, 1, 1)
    truth = (labels.unsqueeze(1) == numbers).float()
    planes = torch.stack([truth, masks.float(), numbers.expand_as(masks).float()], dim=2)
    return TensorDataset(images.repeat_interleave(classes, 0), planes.flatten(0, 1))


def row_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """The soft Dice of each example's region: what `ray_tracin.regions.region_scores` gives, written for one class."""
    truth, mask, number = targets.unbind(1)
    channels = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    probability = (logits.softmax(1) * (channels == number.unsqueeze(1))).sum(1)
    intersection = (probability * truth * mask).sum((1, 2))
    mass = ((probability + truth) * mask).sum((1, 2))
    # A region without a pixel has a score and a gradient of 0, as in the packed rows of the engine.
    return 2 * intersection / torch.where(mass > 0, mass, 1)


def as_kernel(products: Tensor, classes: int) -> Tensor:
    """(class, query, class, train) from a matrix whose rows and columns are regions, slice by slice."""
    slices = len(products) // classes
    return products.reshape(slices, classes, slices, classes).permute(1, 0, 3, 2).detach()
