"""Lists, shares, patients and cosines against loops over plain values."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_tracin.explainers import (
    NONE,
    above_zero,
    cosine_influence,
    count_classes,
    count_lists,
    find_global,
    first_local,
    first_places,
    gradient_norms,
    list_shares,
    local_ranks,
    rank_regions,
    sum_by_patient,
    without_self,
    without_zeros,
)

# Few values, so that ties are the rule; zeros of both signs; infinities. No subnormals: libraries may flush them to 0.
SCORES = st.sampled_from([math.nan, 0.0, -0.0, 1.0, -1.0, 2.5, -2.5, math.inf, -math.inf, 1e-30, -1e-30, 3e38])


@st.composite
def rows(draw):
    columns = draw(st.integers(1, 12))
    return draw(st.lists(st.lists(SCORES, min_size=columns, max_size=columns), min_size=1, max_size=4))


@given(rows(), st.integers(1, 15))
def test_lists_equal_a_sort_of_pairs(scores, k):
    proponents, opponents = (rank_regions(sign * torch.tensor(scores), k).tolist() for sign in (1, -1))
    width = min(k, len(scores[0]))
    for row, best, worst in zip(torch.tensor(scores).tolist(), proponents, opponents, strict=True):
        present = [(value, column) for column, value in enumerate(row) if not math.isnan(value)]
        for found, sign in ((best, -1), (worst, 1)):
            expected = [column for _, column in sorted((sign * value, column) for value, column in present)][:width]
            assert found == expected + [NONE] * (width - len(expected))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=40))
def test_lists_of_any_floats_are_sorted(scores):
    found = rank_regions(torch.tensor([scores]), len(scores))[0].tolist()
    assert found == sorted(range(len(scores)), key=lambda column: (-scores[column], column))


def test_a_region_is_left_out_of_its_own_list_and_of_no_other():
    # Class 2 of 3 train slices: the queries at positions 1 and 2 have columns 3 + 1 and 3 + 2.
    own = without_self(torch.ones(2, 9), class_id=2, start=1, train=3)
    assert own.isnan().nonzero().tolist() == [[0, 4], [1, 5]]


def test_shares_of_lists():
    lists = torch.tensor([[2, 0, NONE], [2, 1, 3], [2, NONE, NONE]])
    counts = count_lists(lists, 5)
    assert counts.tolist() == [1, 1, 3, 1, 0]
    assert list_shares(counts, torch.tensor([3])).tolist() == pytest.approx([1 / 3, 1 / 3, 1.0, 1 / 3, 0.0])
    assert list_shares(torch.zeros(2, dtype=torch.int64), torch.tensor([0])).isnan().all()


def test_global_explainers_have_a_share_of_either_kind_above_the_threshold_not_at_it():
    shares = torch.tensor([0.3, 0.31, 0.0, 0.1, math.nan], dtype=torch.float64)
    others = torch.tensor([0.0, 0.0, 0.9, 0.3, math.nan], dtype=torch.float64)
    assert find_global(shares, others, 0.3).tolist() == [False, True, True, False, False]


def test_what_is_left_of_a_list_without_global_explainers():
    lists = torch.tensor([[4, 1, 0, 2, 3], [1, 4, 3, NONE, NONE]])
    is_global = torch.tensor([False, True, False, False, True])
    assert local_ranks(lists, is_global).tolist() == [[0, 0, 1, 2, 3], [0, 0, 1, 0, 0]]
    assert first_local(lists, is_global, 2).tolist() == [[True] * 4 + [False], [True] * 3 + [False] * 2]
    # A global explainer after the last place is not listed.
    lists = torch.tensor([[0, 4, 2, 1, 3]])
    assert first_local(lists, is_global, 2).tolist() == [[True, True, True, False, False]]


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)), st.integers(0, 8), st.integers(1, 8))
def test_what_is_left_equals_a_walk_down_the_list(order, chosen, length, k):
    lists = torch.tensor([[*order[:length], *[NONE] * (8 - length)]])
    is_global = torch.tensor([column in chosen for column in range(8)])
    ranks, kept = [], []
    for column in order[:length]:
        done = max(ranks, default=0)
        kept.append(done < k)
        ranks.append(0 if column in chosen else done + 1)
    padding = 8 - length
    assert local_ranks(lists, is_global).tolist() == [ranks + [0] * padding]
    assert first_local(lists, is_global, k).tolist() == [kept + [False] * padding]


def test_classes_of_the_first_entries():
    classes = torch.tensor([1, 1, 2, 3, 3])
    lists = torch.tensor([[4, 1, 0, 2, 3], [3, 2, NONE, NONE, NONE]])
    is_global = torch.tensor([False, True, False, False, False])
    # First two that are not column 1: 4, 0 and 3, 2.
    assert count_classes(lists, is_global, classes, 2, 4).tolist() == [1, 1, 2, 0]


def test_the_cosine_is_that_of_all_checkpoints_gradients_in_a_row():
    random = np.random.default_rng(0)
    rates = np.array([0.5, 0.02, 0.1])
    query, train = random.normal(size=(3, 4, 7)), random.normal(size=(3, 5, 7))
    influence = sum(rate * q @ t.T for rate, q, t in zip(rates, query, train, strict=True))
    rows, columns = (
        np.concatenate([math.sqrt(rate) * side for rate, side in zip(rates, sides, strict=True)], axis=1)
        for sides in (query, train)
    )
    expected = np.array([[q @ t / np.linalg.norm(q) / np.linalg.norm(t) for t in columns] for q in rows])
    norms = [gradient_norms(torch.tensor((side**2).sum(2)), torch.tensor(rates)) for side in (query, train)]
    found = cosine_influence(torch.tensor(influence, dtype=torch.float32), *norms)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_cosine_with_nothing_is_undefined():
    norms = gradient_norms(torch.tensor([[4.0, 0.0, math.nan]]), torch.tensor([0.25], dtype=torch.float64))
    assert norms[:2].tolist() == [1.0, 0.0]
    found = cosine_influence(torch.tensor([[1.0, 0.0, math.nan], [0.0, 0.0, math.nan]]), norms[:2], norms)
    assert found[0, 0] == 1
    assert found.isnan().tolist() == [[False, True, True], [True, True, True]]


@given(rows(), st.data())
def test_patients_are_sums_of_what_is_there(scores, data):
    finite = [[value if abs(value) < 10 else math.nan for value in row] for row in scores]
    columns = len(finite[0])
    patients = data.draw(st.lists(st.integers(0, 2), min_size=columns, max_size=columns))
    left_out = data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns))
    sums, counts = sum_by_patient(torch.tensor(finite), torch.tensor(patients), torch.tensor(left_out), 3)
    for place, row in enumerate(torch.tensor(finite).tolist()):
        kept = [(p, v) for p, v, out in zip(patients, row, left_out, strict=True) if not (out or math.isnan(v))]
        number = Counter(patient for patient, _ in kept)
        expected = [
            math.fsum(v for p, v in kept if p == patient) if number[patient] else math.nan for patient in range(3)
        ]
        assert counts[place].tolist() == [number[patient] for patient in range(3)]
        np.testing.assert_allclose(sums[place], expected, rtol=1e-6, atol=1e-6)


def test_a_query_on_which_every_influence_is_0_ranks_nobody() -> None:
    nan = math.nan
    score = torch.tensor([[0.0, -0.0, nan], [0.0, 1e-30, nan], [nan, nan, nan], [-2.0, 0.0, 3.0]])
    found = without_zeros(score)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], score[1:], rtol=0, atol=0, equal_nan=True)
    assert (rank_regions(found, 2)[0] == NONE).all()


def test_places_are_those_among_all_without_those_left_out():
    key = torch.tensor([[5.0, 4.0, math.nan, 3.0, 2.0, 1.0], [math.nan, math.nan, 1.0, math.nan, math.nan, math.nan]])
    left_out = torch.tensor([True, False, False, False, True, False])
    assert [part.tolist() for part in first_places(key[:1], left_out, 2)] == [[1, 3], [2, 3]]
    assert [part.tolist() for part in first_places(key[1:], left_out, 2)] == [[2], [1]]
    assert [part.tolist() for part in first_places(key[:1], left_out, 9)] == [[1, 3, 5], [2, 3, 5]]
    assert [part.tolist() for part in first_places(above_zero(key - 4)[:1], left_out & False, 3)] == [[0], [1]]
