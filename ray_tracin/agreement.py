"""How well one influence matrix stands in for another: by values, by the order of each row, by what is at its ends.

The one idea: a row is what a reader sees of the tensor, the train regions in the order of their influence on one query
region. So agreement is measured row by row. Pairs that are NaN in the reference don't count.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Measures of an estimate against its reference; 1 (and a difference of 0) where they are the same.

    Rows without two different values in the reference order nothing, and don't count.
    """

    rows: int
    difference: float
    """Relative, in the Frobenius norm."""
    spearman: float
    """Mean of the rank correlations of the rows."""
    spearman_worst: float
    """The lowest of them."""
    top_10: float
    """Mean share of a row's 10 largest and 10 smallest train regions that the estimate has at the same end too."""
    top_20: float
    """The same of 20."""


def measure_agreement(estimate: Float[Tensor, "row column"], reference: Float[Tensor, "row column"]) -> Agreement:
    """How well the estimate stands in for the reference.

    Raises:
        ValueError: no row of the reference has two different values, or the estimate lacks one of its values.
    """
    there = ~reference.isnan()
    if bool((estimate.isnan() & there).any()):
        raise ValueError("the estimate is not a number where the reference is one: the two cover different regions")
    rows = [
        (mine[kept].double(), other[kept].double())
        for mine, other, kept in zip(estimate, reference, there, strict=True)
        if bool((other[kept] != other[kept][:1]).any())
    ]
    if not rows:
        raise ValueError(
            "no row has two different values to compare: there is no query region, or a single train region"
        )
    correlations = torch.tensor([rank_correlation(*row) for row in rows])
    squares = sum(float((mine - other).square().sum()) for mine, other in rows)
    norms = sum(float(other.square().sum()) for _, other in rows)
    return Agreement(
        rows=len(rows),
        difference=(squares / norms) ** 0.5 if norms else 0.0,
        spearman=float(correlations.mean()),
        spearman_worst=float(correlations.min()),
        top_10=_mean_overlap(rows, 10),
        top_20=_mean_overlap(rows, 20),
    )


def rank_correlation(one: Float[Tensor, " column"], two: Float[Tensor, " column"]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing the mean of theirs; 0 where a side is constant."""
    left, right = (_ranks(values) for values in (one, two))
    left, right = left - left.mean(), right - right.mean()
    scale = left.norm() * right.norm()
    return float(left @ right / scale) if scale > 0 else 0.0


def _ranks(values: Float[Tensor, " column"]) -> Float[Tensor, " column"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[inverse]
    return ranks


def top_overlap(one: Float[Tensor, " column"], two: Float[Tensor, " column"], k: int) -> float:
    """The share of the k largest and of the k smallest that both have at the same end; k at most half the columns."""
    k = max(1, min(k, len(one) // 2))
    shares = []
    for largest in (True, False):
        left, right = (set(values.topk(k, largest=largest).indices.tolist()) for values in (one, two))
        shares.append(len(left & right) / k)
    return sum(shares) / 2


def _mean_overlap(rows: list[tuple[Tensor, Tensor]], k: int) -> float:
    return sum(top_overlap(mine, other, k) for mine, other in rows) / len(rows)
