import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ray_tracin.config import FeaturesConfig
from ray_tracin.features import (
    Trend,
    classify_trend,
    feature_sets,
    impacts,
    importance_sums,
    is_predictive,
    region_maxima,
    similarity,
)

SETTINGS = FeaturesConfig()


def test_maxima_are_those_of_the_pixels_of_each_region():
    rng = np.random.default_rng(0)
    maps, masks = rng.normal(size=(3, 5, 4, 6)).astype(np.float32) - 3, rng.random((3, 2, 4, 6)) < 0.3
    masks[1, 0] = False
    got = region_maxima(torch.from_numpy(maps), torch.from_numpy(masks)).numpy()
    for z in range(3):
        for j in range(2):
            pixels = maps[z][:, masks[z, j]]
            expected = pixels.max(1) if pixels.shape[1] else np.full(5, np.nan)
            assert np.array_equal(got[z, j], expected, equal_nan=True)
    assert np.isnan(got[1, 0]).all()
    assert (got[0] < 0).any(), "a maximum below 0 stays below 0"


def test_hand_worked_similarities():
    # 2·1/2² = 0.5; equal: 1; opposite: −1; one silent: 0; both silent, or no region: undefined.
    query = torch.tensor([1.0, 3.0, -2.0, 0.0, 0.0, math.nan, 1e-30])
    train = torch.tensor([2.0, 3.0, 2.0, 5.0, 0.0, 1.0, 2e-30])
    got = similarity(query, train)
    expected = torch.tensor([0.5, 1.0, -1.0, 0.0, math.nan, math.nan, 0.5])
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(similarity(train, query), got, equal_nan=True)


def expected_sums(influence, query, train):
    """Eq. 8 by loops over ranks, in Python numbers."""
    features, columns = train.shape[1], train.shape[0]
    sums, counts = np.zeros((features, columns)), np.zeros((features, columns), dtype=int)
    for row, maxima in zip(influence, query, strict=True):
        ranked = sorted((c for c in range(columns) if not math.isnan(row[c])), key=lambda c: (-row[c], c))
        for rank, column in enumerate(ranked):
            for k in range(features):
                a, b = float(maxima[k]), float(train[column, k])
                largest = max(abs(a), abs(b))
                if math.isnan(a) or math.isnan(b) or largest == 0:
                    continue
                sums[k, rank] += a * b / largest**2
                counts[k, rank] += 1
    return sums, counts


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), queries=st.integers(0, 5), columns=st.integers(1, 9), features=st.integers(1, 4))
def test_sums_along_the_ranking_equal_the_loop(seed, queries, columns, features):
    rng = np.random.default_rng(seed)
    influence = rng.integers(-2, 3, (queries, columns)).astype(np.float32)  # ties everywhere
    influence[:, rng.random(columns) < 0.2] = np.nan
    influence[rng.random(queries) < 0.2] = np.nan
    query, train = (rng.integers(0, 4, (n, features)).astype(np.float32) for n in (queries, columns))
    train[rng.random(columns) < 0.1] = np.nan
    got = importance_sums(*(torch.from_numpy(part) for part in (influence, query, train)))
    sums, counts = expected_sums(influence, query, train)
    np.testing.assert_allclose(got[0].numpy(), sums, rtol=1e-6)
    assert np.array_equal(got[1].numpy(), counts)


def test_sums_of_parts_of_queries_and_of_features_are_those_of_all():
    rng = np.random.default_rng(3)
    influence, query, train = (
        torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((6, 8), (6, 5), (8, 5))
    )
    whole, counts = importance_sums(influence, query, train)
    stripes = [importance_sums(influence[part], query[part], train) for part in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(stripes[0][0] + stripes[1][0], whole)
    assert torch.equal(stripes[0][1] + stripes[1][1], counts)
    for part in (slice(0, 2), slice(2, 5)):
        assert torch.equal(importance_sums(influence, query[:, part], train[:, part])[0], whole[part])


T = np.linspace(0, 1, 400)
PLANTED = {
    "flat": (0.7 + 0 * T, "flat"),
    "flat, a change too small to matter": (0.7 + 0.03 * T, "flat"),
    "rising": (0.3 + 0.4 * T, "linear"),
    "falling": (0.8 - 0.4 * T, "linear"),
    "falling and levelling off": (0.3 + 0.5 * np.exp(-6 * T), "linear"),
    "rising and levelling off": (0.8 - 0.5 * np.exp(-6 * T), "linear"),
    "falling ever steeper": (0.8 - 0.5 * T**2, "linear"),
    "symmetric u": (0.5 + 1.2 * (T - 0.5) ** 2, "u_shaped"),
    "leaning u": (0.4 + 1.5 * (T - 0.65) ** 2, "u_shaped"),
    "u with steep ends": (0.4 + 0.4 * np.abs(2 * T - 1) ** 6, "u_shaped"),
    "v": (0.4 + 0.6 * np.abs(T - 0.4), "u_shaped"),
    "arch": (0.8 - 1.2 * (T - 0.45) ** 2, "inverted_u"),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_planted_curves_are_recognised(name, noise):
    curve, kind = PLANTED[name]
    for seed in range(10):
        values = curve + np.random.default_rng(seed).normal(0, noise, len(T))
        assert classify_trend(torch.from_numpy(values), SETTINGS).kind == kind, seed


def test_noise_alone_is_flat():
    curves = np.random.default_rng(0).normal(0.5, 0.3, (300, 60))
    kinds = [classify_trend(torch.from_numpy(curve), SETTINGS).kind for curve in curves]
    assert kinds.count("flat") >= 297


def test_slope_and_curvature_are_the_fitted_coefficients():
    rng = np.random.default_rng(1)
    values = 0.6 - 0.3 * T + 0.8 * T**2 + rng.normal(0, 0.05, len(T))
    values[rng.random(len(T)) < 0.2] = np.nan
    values[-30:] = np.nan  # regions that no query ranks
    there = ~np.isnan(values)
    places = np.arange(len(T))[there] / np.flatnonzero(there)[-1]
    trend = classify_trend(torch.from_numpy(values), SETTINGS)
    assert trend.slope == pytest.approx(np.polyfit(places, values[there], 1)[0], rel=1e-9)
    assert trend.curvature == pytest.approx(np.polyfit(places, values[there], 2)[0], rel=1e-9)


def test_a_silent_feature_is_dead_and_a_short_curve_flat():
    dead, short = torch.full((30,), math.nan), torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1, 0.0, -0.1])
    assert classify_trend(dead, SETTINGS).kind == "dead"
    assert math.isnan(classify_trend(dead, SETTINGS).slope)
    assert classify_trend(short, SETTINGS).kind == "flat"
    longer = torch.cat([short, torch.tensor([-0.3])])
    assert classify_trend(longer, SETTINGS).kind == "linear"
    assert classify_trend(torch.zeros(50), SETTINGS) == Trend("flat", 0.0, 0.0)


@pytest.mark.parametrize(
    ("trend", "first", "expected"),
    [
        (Trend("u_shaped", 0.1, 1.0), 0.66, True),
        (Trend("u_shaped", 0.1, 1.0), 0.65, False),
        (Trend("u_shaped", 0.1, 1.0), math.nan, False),
        (Trend("linear", -0.1, 0.0), 0.9, True),
        (Trend("linear", 0.1, 0.0), 0.9, False),
        (Trend("inverted_u", -0.1, -1.0), 0.9, False),
        (Trend("flat", -0.1, 0.0), 0.9, False),
        (Trend("dead", math.nan, math.nan), math.nan, False),
    ],
)
def test_predictive_is_u_shaped_or_falling_and_important_at_the_first_proponent(trend, first, expected):
    assert is_predictive(trend, first, SETTINGS) is expected


def test_sets_are_disjoint_of_one_size_and_a_function_of_the_seed():
    sets = feature_sets([7, 2, 5], 12, 4, (3, 1))
    assert list(sets) == ["predictive", "others", "random_1", "random_2", "random_3", "random_4"]
    assert sets["predictive"] == (2, 5, 7)
    assert sorted(sets["predictive"] + sets["others"]) == list(range(12))
    drawn = [sets[f"random_{number}"] for number in range(1, 5)]
    assert all(len(set(chosen)) == 3 and set(chosen) <= set(range(12)) for chosen in drawn)
    assert len(set(drawn)) > 1
    assert sets == feature_sets([7, 2, 5], 12, 4, (3, 1))
    assert sets != feature_sets([7, 2, 5], 12, 4, (3, 2))
    assert feature_sets([], 12, 4, (3, 1)) == {}
    assert list(feature_sets([0, 1], 2, 0, (3, 1))) == ["predictive"]


def hard_dice(prediction, truth, class_id):
    a, b = prediction == class_id, truth == class_id
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else np.nan


def test_impact_is_what_really_zeroing_the_maps_costs():
    generator = torch.Generator().manual_seed(0)
    head = nn.Conv2d(6, 4, 1)
    maps = torch.rand(3, 6, 9, 7, generator=generator)
    labels = torch.randint(0, 3, (3, 9, 7), generator=generator)  # class 3 never stands in the truth
    labels[1] = 0
    sets = [(0,), (3,), (1, 4), (0, 2, 3, 5), tuple(range(6))]
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias[3] = -20.0
        got = impacts(head(maps), maps, head.weight, labels, sets)
        before = head(maps).argmax(1).numpy()
        for number, chosen in enumerate(sets):
            without = maps.clone()
            without[:, list(chosen)] = 0
            after = head(without).argmax(1).numpy()
            for z in range(3):
                for i in (1, 2, 3):
                    first, second = (hard_dice(side[z], labels[z].numpy(), i) for side in (before, after))
                    expected = first - (0.0 if np.isnan(second) else second)
                    assert got[z, number, i - 1].item() == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert got[:, :, 2].isnan().all(), "a class that stands nowhere"
    assert (got[0] != 0).any()


def test_a_false_prediction_that_masking_removes_changes_nothing():
    maps = torch.ones(1, 1, 2, 2)
    weight = torch.tensor([0.0, 5.0]).view(2, 1, 1, 1)
    logits = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1) + weight.view(1, 2, 1, 1) * maps
    got = impacts(logits, maps, weight, torch.zeros(1, 2, 2, dtype=torch.int64), [(0,)])
    assert got.tolist() == [[[0.0]]]


def test_impact_refuses_what_it_cannot_mask():
    maps, labels = torch.rand(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a filter from 0 to 1, got 2"):
        impacts(torch.rand(1, 3, 4, 4), maps, torch.rand(3, 2, 1, 1), labels, [(2,)])
    with pytest.raises(ValueError, match="expects a head with a kernel of one pixel"):
        impacts(torch.rand(1, 3, 4, 4), maps, torch.rand(3, 2, 3, 3), labels, [(0, 1)])
    with pytest.raises(ValueError, match=r"expected labels from 0 \(background\) to 2, got values from 0 to 7"):
        impacts(torch.rand(1, 3, 4, 4), maps, torch.rand(3, 2, 1, 1), labels.index_fill(1, torch.tensor(0), 7), [(0,)])
