"""Measures of agreement against hand-worked values and SciPy's."""

import pytest
import scipy.stats
import torch

from ray_tracin.agreement import measure_agreement, rank_correlation, top_overlap


def test_rank_correlation_is_scipys_with_ties():
    one, two = torch.tensor([3.0, 1.0, 1.0, 7.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 5.0, 9.0, 2.0])
    expected = scipy.stats.spearmanr(one.numpy(), two.numpy()).statistic
    assert rank_correlation(one, two) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(one, torch.zeros(6)) == 0


def test_overlap_counts_both_ends():
    values = torch.arange(8.0)
    swapped = values.clone()
    swapped[[0, 4]] = swapped[[4, 0]]  # one of the two smallest leaves, the largest stay
    assert top_overlap(values, swapped, 2) == 0.75
    assert top_overlap(values, values, 100) == 1
    assert top_overlap(values, -values, 4) == 0


def test_the_same_matrix_agrees_and_absent_regions_do_not_count():
    # The last two rows order nothing: no region exists there, or nothing has an influence.
    reference = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 1.0, 2.0], [torch.nan] * 3, [0.0] * 3])
    estimate = torch.where(reference.isnan(), 5.0, 2 * reference)
    found = measure_agreement(estimate, reference)
    assert found.rows == 2
    assert found.difference == pytest.approx(1)
    assert (found.spearman, found.spearman_worst, found.top_10, found.top_20) == (1, 1, 1, 1)


def test_what_can_not_be_compared_is_refused():
    with pytest.raises(ValueError, match="no row has two different values"):
        measure_agreement(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="cover different regions"):
        measure_agreement(torch.full((1, 2), torch.nan), torch.zeros(1, 2))
