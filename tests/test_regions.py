import math

import jaxtyping
import oracle
import pytest
import torch

from ray_tracin.regions import (
    predicted_labels,
    region_masks,
    region_overlap,
    region_pixels,
    region_scores,
    whole_slices,
)


def logits_of(probabilities):
    """Logits whose softmax is what is given: (channel, pixel) of one slice."""
    return torch.tensor(probabilities).log().unsqueeze(0)


def test_score_of_hand_worked_regions():
    # Three pixels; class 1 has P = 0.9, 0.85, 0.1 and is true at the first. Its region, P > 0.8, is the first two:
    # D = 2 · 0.9 / (0.9 + 1 + 0.85) = 1.8 / 2.75. Class 2 has P = 0.05, 0.05, 0.85, true at the last:
    # D = 2 · 0.85 / (0.85 + 1) = 1.7 / 1.85.
    logits = logits_of([[0.05, 0.10, 0.05], [0.90, 0.85, 0.10], [0.05, 0.05, 0.85]])
    labels = torch.tensor([[1, 0, 2]], dtype=torch.uint8)
    masks = region_masks(logits, 0.8)
    assert masks.tolist() == [[[True, True, False], [False, False, True]]]
    assert region_scores(logits, labels, masks)[0].tolist() == pytest.approx([1.8 / 2.75, 1.7 / 1.85])
    assert region_pixels(masks).tolist() == [[2, 1]]
    assert region_overlap(masks, labels).tolist() == [[0.5, 1.0]]
    assert predicted_labels(logits).tolist() == [[1, 1, 2]]
    assert predicted_labels(logits).dtype == torch.uint8


def test_whole_slice_score_is_the_dice_of_the_loss():
    # Eq. 1 on the same slice: class 1 sums P = 1.85 and GT = 1 with intersection 0.9, so D = 1.8 / 2.85.
    logits = logits_of([[0.05, 0.10, 0.05], [0.90, 0.85, 0.10], [0.05, 0.05, 0.85]])
    labels = torch.tensor([[1, 0, 2]])
    masks = whole_slices(region_masks(logits, 0.8))
    assert masks.all()
    assert region_scores(logits, labels, masks)[0].tolist() == pytest.approx([1.8 / 2.85, 1.7 / 1.95])


@pytest.mark.parametrize("size", [(30,), (5, 6), (3, 4, 3)])
def test_scores_and_their_gradients_equal_the_oracle(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, *size, generator=generator).requires_grad_()
    labels = torch.randint(0, 4, (3, *size), generator=generator)
    masks = torch.rand(3, 3, *size, generator=generator) < 0.4
    masks[1, 2] = False
    scores = region_scores(logits, labels, masks)
    exact = logits.detach().double().requires_grad_()
    for z in range(3):
        for j in range(3):
            if not masks[z, j].any():
                assert scores[z, j].isnan()
                continue
            expected = oracle.dice(exact[z], labels[z], masks[z, j], j + 1)
            assert scores[z, j].item() == pytest.approx(expected.item(), rel=1e-6)
            (got,) = torch.autograd.grad(scores[z, j], logits, retain_graph=True)
            (wanted,) = torch.autograd.grad(expected, exact)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)


def test_an_absent_region_poisons_nothing():
    # All logits of slice 0 are NaN outside of its one region's pixel: nothing of them may reach slice 1 or that region.
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, :, 1:] = math.nan
    logits.requires_grad_()
    masks = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    masks[0, 0, 0, 0] = masks[1, 1] = True
    scores = region_scores(logits, torch.ones(2, 2, 2, dtype=torch.uint8), masks)
    assert scores.isnan().tolist() == [[False, True], [True, False]]
    (gradient,) = torch.autograd.grad(scores.nansum(), logits)
    assert gradient[1].isfinite().all()
    assert gradient[0, :, 0, 0].isfinite().all()
    assert (region_overlap(masks, torch.ones(2, 2, 2, dtype=torch.uint8)).isnan() == scores.isnan()).all()


def test_the_threshold_is_exceeded_not_reached():
    logits = torch.zeros(1, 2, 3)
    assert not region_masks(logits, 0.5).any()


def test_a_class_that_underflows_everywhere_has_no_score():
    logits = torch.tensor([[[200.0], [0.0]]], requires_grad=True)
    score = region_scores(logits, torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1, 1, dtype=torch.bool))
    assert score.isnan().item()
    assert torch.autograd.grad(score.nansum(), logits)[0].tolist() == [[[0.0], [0.0]]]


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected masks of shape \(1, 2, 5\).*got \(1, 3, 5\): one mask a class"):
        region_scores(torch.zeros(1, 3, 5), torch.zeros(1, 5, dtype=torch.uint8), torch.ones(1, 3, 5, dtype=torch.bool))


@pytest.mark.parametrize("label", [3, 255, -1])
def test_labels_that_are_no_class_are_refused(label):
    labels = torch.zeros(1, 5, dtype=torch.int64)
    labels[0, 2] = label
    with pytest.raises(ValueError, match=rf"expected labels from 0 \(background\) to 2.*{label}"):
        region_scores(torch.zeros(1, 3, 5), labels, torch.ones(1, 2, 5, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 5), (1, 4)])
def test_labels_that_are_not_one_map_a_slice_are_refused(shape, monkeypatch):
    # As for users, whose arguments aren't checked against annotations.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    labels = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected labels of shape \(1, 5\).*without an axis of channels"):
        region_scores(torch.zeros(1, 3, 5), labels, torch.ones(1, 2, 5, dtype=torch.bool))
