"""What is differentiated: which pixels a region has, and the Dice of a region as a function of the logits.

The one idea: a region's score depends on the logits, the truth and a *fixed* mask. The mask says where the network was
confident; it isn't itself differentiated. Everything about a region without a pixel is NaN, and that NaN stays in its
place: it reaches neither the scores nor the gradients of other regions.

It doesn't know networks, parameters or storage.
"""

import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from ray_tracin.arithmetic import wide

BACKGROUND = 0
"""The label, and the channel of the logits, that is never a class."""


def region_masks(logits: Float[Tensor, "slice channel *space"], threshold: float) -> Bool[Tensor, "slice class *space"]:
    """The pixels whose softmax for a class exceeds the threshold (section 3.3), background left out.

    At a threshold of 0.5 and above the regions of a slice are disjoint and follow the argmax.
    """
    return foreground_probabilities(logits) > threshold


def foreground_probabilities(logits: Float[Tensor, "slice channel *space"]) -> Float[Tensor, "slice class *space"]:
    """The softmax over all channels, background left out: the ``P`` of the paper, in float32 at the least."""
    return logits.softmax(dim=1, dtype=wide(logits.dtype))[:, BACKGROUND + 1 :]


def foreground_truth(labels: Integer[Tensor, "slice *space"], classes: int) -> Bool[Tensor, "slice class *space"]:
    """Where each class is true: the one-hot ``GT`` of the paper, background left out.

    Raises:
        ValueError: a label is no class.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(
            f"expected labels from 0 (background) to {classes}, got values from {int(labels.min())} to "
            f"{int(labels.max())}: map the label values to classes first"
        )
    numbers = torch.arange(1, classes + 1, device=labels.device).view(-1, *(1,) * (labels.dim() - 1))
    return labels.unsqueeze(1) == numbers


def region_scores(
    logits: Float[Tensor, "slice channel *space"],
    labels: Integer[Tensor, "slice *space"],
    masks: Bool[Tensor, "slice class *space"],
) -> Float[Tensor, "slice class"]:
    """The soft Dice of every region, differentiable in the logits; NaN where the mask has no pixel.

    ``D_i = 2 Σ_{p∈R_i} P_i GT_i / Σ_{p∈R_i} (P_i + GT_i)`` (section 3.3), from 0 to 1, without smoothing. With masks
    from `whole_slices` it is the term of eq. 5, the unsmoothed Dice of the loss; that one is also NaN in the corner
    where the denominator is exactly 0: the class is nowhere true and every probability has underflowed.

    Raises:
        ValueError: the masks don't have one class for each channel but the background, the labels aren't one map a
            slice, or a label is no class.
    """
    probabilities = foreground_probabilities(logits)
    if probabilities.shape != masks.shape:
        raise ValueError(
            f"expected masks of shape {tuple(probabilities.shape)} (slice, class, *space) for logits of shape "
            f"{tuple(logits.shape)}, got {tuple(masks.shape)}: one mask a class, none for the background"
        )
    expected = (len(masks), *masks.shape[2:])
    if labels.shape != expected:
        raise ValueError(
            f"expected labels of shape {expected} (slice, *space), got {tuple(labels.shape)}: one map a slice, without "
            "an axis of channels"
        )
    truth = foreground_truth(labels, masks.shape[1])
    intersection = _total(probabilities, masks & truth)
    mass = _total(probabilities + truth, masks)
    defined = mass != 0
    # The division is by 1 where the region doesn't exist: a NaN made there would come back through `where` in backward.
    dice = 2 * intersection / torch.where(defined, mass, 1)
    return torch.where(defined, dice, torch.nan)


def region_pixels(masks: Bool[Tensor, "slice class *space"]) -> Integer[Tensor, "slice class"]:
    """How many pixels every region has; one with none doesn't exist."""
    return masks.flatten(2).sum(2)


def region_overlap(
    masks: Bool[Tensor, "slice class *space"], labels: Integer[Tensor, "slice *space"]
) -> Float[Tensor, "slice class"]:
    """The share of a region's pixels whose truth is that class, 0 to 1; NaN where the region doesn't exist.

    Where it is low, the region's score and gradient are near 0 whatever the cause, a swapped annotation included.
    """
    hits = region_pixels(masks & foreground_truth(labels, masks.shape[1]))
    # 0 / 0 is NaN, which is what a region that doesn't exist has.
    return hits / region_pixels(masks)


def whole_slices(masks: Bool[Tensor, "slice class *space"]) -> Bool[Tensor, "slice class *space"]:
    """Masks of the same shape that hold every pixel (``gradients.score: image``)."""
    return torch.ones_like(masks)


def predicted_labels(logits: Float[Tensor, "slice channel *space"]) -> UInt8[Tensor, "slice *space"]:
    """The most probable label of every pixel, which stands in for the truth of a slice that has none."""
    return logits.argmax(dim=1).to(torch.uint8)


def _total(values: Float[Tensor, "slice class *space"], where: Bool[Tensor, "slice class *space"]) -> Tensor:
    # Selected, not multiplied: NaN · 0 would spread what is outside the region into it.
    return torch.where(where, values, 0).flatten(2).sum(2)
