"""What latent features say about an influence: their maxima in regions, importance along a ranking, and impact.

The one idea: a feature is a map of the last hidden layer, and what it says of a region is one number, its maximum
there. A feature explains an influence if query and strongest train regions agree in that number (importance), and the
network relies on it if its prediction suffers where the map is masked (impact). The method claims that the two go
together.

Features are numbered from 0, as the channels of the head's kernel. It doesn't know runs, files or networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Integer
from scipy.special import fdtrc
from torch import Tensor

from ray_tracin.config import FeaturesConfig
from ray_tracin.regions import BACKGROUND, foreground_truth
from ray_tracin.unet import masked_logits

TrendKind = Literal["flat", "linear", "u_shaped", "inverted_u", "dead"]

FEWEST_RANKS = 8
"""Of fewer values no trend can be told from chance."""
END = 0.2
"""Share of the ranks that makes an end of a curve, or its middle."""


def region_maxima(
    maps: Float[Tensor, "slice feature *space"], masks: Bool[Tensor, "slice class *space"]
) -> Float[Tensor, "slice class feature"]:
    """``f(z_j)_k``, the maximum of map k over region (j, z); NaN where the region has no pixel (section 3.4)."""
    flat, chosen = maps.flatten(2), masks.flatten(2)
    # A class at a time: all at once would hold the maps once more for every class.
    classes = [torch.where(mask[:, None], flat, -torch.inf).amax(2) for mask in chosen.unbind(1)]
    return torch.where(chosen.any(2)[:, :, None], torch.stack(classes, dim=1), torch.nan)


def similarity(query: Float[Tensor, "*#shape"], train: Float[Tensor, "*#shape"]) -> Float[Tensor, "..."]:
    """``S = f'·f / max(|f'|, |f|)²`` of two maxima (eq. 7): from −1 to 1, 1 where they are equal.

    NaN where both are 0 (the feature is silent in both regions, which says nothing) and where one is NaN.
    """
    largest = torch.maximum(query.abs(), train.abs())
    # Each by the larger of the two, not their product by its square: the square of a small maximum underflows.
    return (query / largest) * (train / largest)


def importance_sums(
    influence: Float[Tensor, "query column"],
    query_maxima: Float[Tensor, "query feature"],
    train_maxima: Float[Tensor, "column feature"],
) -> tuple[Float64[Tensor, "feature column"], Int64[Tensor, "feature column"]]:
    """The sum of the similarities at every rank, and how many there are: their quotient is the importance (eq. 8).

    Each query orders the train regions by falling influence; entry ``r`` of the last axis is the region at rank
    ``r + 1``. Of equal influences the lower column comes first. A NaN influence has no rank (the region doesn't exist,
    or is to be left out), a NaN similarity no place in the sum. Sums and counts of parts of the queries add up; memory
    is that of one query's similarities.
    """
    sums = torch.zeros(train_maxima.shape, dtype=torch.float64)
    counts = torch.zeros(train_maxima.shape, dtype=torch.int64)
    for row, maxima in zip(influence, query_maxima, strict=True):
        ranked = int((~row.isnan()).sum())
        # Rising by the negative: NaN sorts last, and equal values stay in the order of their columns.
        order = torch.sort(-row, stable=True).indices[:ranked]
        similarities = similarity(maxima, train_maxima[order])
        defined = ~similarities.isnan()
        sums[:ranked] += torch.where(defined, similarities, 0)
        counts[:ranked] += defined
    return sums.mT.contiguous(), counts.mT.contiguous()


@dataclass(frozen=True)
class Trend:
    """How a feature's importance goes along the ranks, from the first (at 0) to the last that has one (at 1)."""

    kind: TrendKind
    slope: float
    """Of the fitted line: the change of importance over all ranks. NaN where nothing was fitted."""
    curvature: float
    """The quadratic coefficient of the fitted parabola, in importance over (all ranks)²."""


def classify_trend(importance: Float[Tensor, " rank"], settings: FeaturesConfig) -> Trend:
    """The trend of an importance curve by least squares (section 3.4; the criterion is ours, the paper's is the eye).

    A constant, a line and a parabola are fitted to the ranks that have an importance (NaN: none). ``u_shaped``
    (``inverted_u``): the parabola is better than the line by an F-test at ``settings.significance``, its vertex lies
    between the ends, and the mean of the first fifth of the ranks and that of the last both lie above (below) that of
    the fifth around the vertex by ``settings.smallest_change``. Else ``linear``: the line is better than the constant
    by the same test and changes by that much over all ranks. Else ``flat``, as are curves of fewer than 8 values.
    ``dead``: no rank has an importance, because the feature is 0 in all regions that are compared, or none are.

    Not done: neighbouring ranks are taken as independent.
    """
    there = ~importance.isnan()
    values = importance[there].double().numpy()
    if not len(values):
        return Trend("dead", torch.nan, torch.nan)
    if len(values) < FEWEST_RANKS:
        return Trend("flat", torch.nan, torch.nan)
    ranks = there.nonzero()[:, 0].numpy().astype(np.float64)
    places = ranks / ranks[-1]
    fit = _fit(places, values)
    turns = _better(fit.line, fit.parabola, len(values) - 3, settings.significance) and _turns(
        places, values, fit, settings.smallest_change
    )
    rises = _better(fit.constant, fit.line, len(values) - 2, settings.significance)
    kind: TrendKind = "flat"
    if turns:
        kind = "u_shaped" if fit.curvature > 0 else "inverted_u"
    elif rises and abs(fit.slope) >= settings.smallest_change:
        kind = "linear"
    return Trend(kind, fit.slope, fit.curvature)


@dataclass(frozen=True)
class _Fit:
    """Least squares by polynomials: the squared residuals of each degree, and what the curve is like."""

    constant: float
    line: float
    parabola: float
    slope: float
    curvature: float
    vertex: float
    """Where the parabola turns; NaN where it is a line."""


def _fit(places: Float64[np.ndarray, " rank"], values: Float64[np.ndarray, " rank"]) -> _Fit:
    # By orthogonal polynomials and plain sums: a solver's last bit depends on where its arrays lie in memory.
    first = places - places.mean()
    square = places**2
    lean = (square * first).sum() / (first**2).sum()
    second = square - square.mean() - lean * first
    left = values - values.mean()
    slope = float((left * first).sum() / (first**2).sum())
    bent = left - slope * first
    curvature = float((left * second).sum() / (second**2).sum())
    noise = bent - curvature * second
    constant, line, parabola = (float((part**2).sum()) for part in (left, bent, noise))
    vertex = float(lean - slope / curvature) / 2 if curvature else np.nan
    return _Fit(constant, line, parabola, slope, curvature, vertex)


def _better(simple: float, rich: float, freedom: int, significance: float) -> bool:
    """Whether one more coefficient takes more off the squared residuals than chance would (nested F-test)."""
    gain = simple - rich
    if gain <= 0 or rich <= 0:
        return gain > 0
    return bool(fdtrc(1, freedom, gain / (rich / freedom)) < significance)


def _turns(
    places: Float64[np.ndarray, " rank"], values: Float64[np.ndarray, " rank"], fit: _Fit, smallest_change: float
) -> bool:
    """Whether the values themselves, not only the parabola, come back after its vertex.

    A falling curve that levels off has a parabola with a vertex between the ends too.
    """
    near = np.abs(places - fit.vertex) <= END / 2
    windows = (places <= END, near, places >= 1 - END)
    if not 0 < fit.vertex < 1 or not all(window.any() for window in windows):
        return False
    first, middle, last = (values[window].mean() for window in windows)
    sign = np.sign(fit.curvature)
    return bool(min(sign * (first - middle), sign * (last - middle)) >= smallest_change)


def is_predictive(trend: Trend, importance_first: float, settings: FeaturesConfig) -> bool:
    """Whether a feature is predictive: ``u_shaped``, or linear and falling, and important at the first proponent.

    (Section 3.4.) Important is above ``settings.importance``, 0.65 in the paper; NaN isn't.
    """
    right = trend.kind == "u_shaped" or (trend.kind == "linear" and trend.slope < 0)
    return right and importance_first > settings.importance


def feature_sets(
    predictive: Sequence[int], features: int, random_sets: int, seed: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The features that are masked together: ``predictive``, ``others``, and ``random_1`` … of the first's size.

    Random sets are drawn without replacement from all features by the seed. Empty sets are left out; without a
    predictive feature there is nothing to compare, and no set.
    """
    if not predictive:
        return {}
    generator = np.random.default_rng(list(seed))
    drawn = [generator.choice(features, len(predictive), replace=False) for _ in range(random_sets)]
    sets = {"predictive": sorted(predictive), "others": sorted(set(range(features)) - set(predictive))}
    sets |= {f"random_{number}": sorted(chosen.tolist()) for number, chosen in enumerate(drawn, start=1)}
    return {name: tuple(chosen) for name, chosen in sets.items() if chosen}


def impacts(
    logits: Float[Tensor, "slice channel *space"],
    maps: Float[Tensor, "slice feature *space"],
    head_weight: Float[Tensor, "channel feature *kernel"],
    labels: Integer[Tensor, "slice *space"],
    sets: Sequence[Sequence[int]],
) -> Float64[Tensor, "slice set class"]:
    """``D_i(y) − D_i(y^S)`` of every slice: what class i loses where the features of a set are masked (eq. 9).

    Hard Dice of the argmax on the whole slice; ``y^S`` by the update ``logits − Σ_{k∈S} W[:, k] · h_k``: one forward
    serves all sets. NaN where the class stands neither in the ground truth nor in the prediction ``y``. Where masking
    removes a class that doesn't truly stand there, its Dice is 0 before and after.

    Raises:
        ValueError: the head's kernel is larger than one pixel, there is no such feature, or a label is no class.
    """
    truth = foreground_truth(labels, logits.shape[1] - 1)
    before = _hard_dice(logits, truth)
    dropped = []
    for features in sets:
        after = _hard_dice(_without(logits, maps, head_weight, features), truth)
        dropped.append(before - torch.where(after.isnan(), 0, after))
    return torch.stack(dropped, dim=1)


def _hard_dice(
    logits: Float[Tensor, "slice channel *space"], truth: Bool[Tensor, "slice class *space"]
) -> Float64[Tensor, "slice class"]:
    """``2 |y ∩ GT| / (|y| + |GT|)`` of the argmax y; NaN where both are empty."""
    predicted, true = _predicted(logits).flatten(2), truth.flatten(2)
    return 2 * (predicted & true).sum(2).double() / (predicted.sum(2) + true.sum(2))


def _predicted(logits: Float[Tensor, "slice channel *space"]) -> Bool[Tensor, "slice class *space"]:
    """Where each class has the largest logit; of equal ones the lowest channel's, as `predicted_labels`.

    A channel at a time: argmax over the channels takes ten times as long, and this is done once a set.
    """
    best, label = logits[:, BACKGROUND], torch.zeros_like(logits[:, BACKGROUND], dtype=torch.uint8)
    for channel in range(BACKGROUND + 1, logits.shape[1]):
        label.masked_fill_(logits[:, channel] > best, channel)
        best = torch.maximum(best, logits[:, channel])
    return foreground_truth(label, logits.shape[1] - 1)


def _without(
    logits: Float[Tensor, "slice channel *space"],
    maps: Float[Tensor, "slice feature *space"],
    head_weight: Float[Tensor, "channel feature *kernel"],
    features: Sequence[int],
) -> Float[Tensor, "slice channel *space"]:
    first, *others = features
    left = masked_logits(logits, maps, head_weight, first)
    if not others:
        return left
    # With the other columns 0 rather than absent: picking maps would copy them.
    columns = torch.zeros_like(head_weight).flatten(1)
    columns[:, others] = head_weight.flatten(1)[:, others]
    return left - (columns @ maps.flatten(2)).reshape(logits.shape)
