"""From influence to statements about many queries: lists of proponents, global explainers, patients, cosines.

The one idea: a list (the k largest or smallest influences on a query) is a row of train columns, ``-1`` where there are
no more, so that ranking, counting and leaving out are array operations over all queries of a stripe.

It doesn't know networks, runs or files. `influence` makes the scores, `explaining` writes the tables.
"""

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

NONE = -1
"""The column of a place in a list that is shorter than the others."""
_NAN_KEY = torch.iinfo(torch.int64).min
_COLUMN_BITS = 32


def rank_regions(score: Float32[Tensor, "query column"], k: int) -> Int64[Tensor, "query rank"]:
    """The columns of the k largest scores of every query, largest first: its proponents (section 3.3).

    The opponents are those of ``-score``: smallest first. NaN (no such region) is left out; of equal scores the lower
    column comes first. Where a query has fewer than k, `NONE` follows; there are ``min(k, columns)`` places. Not done:
    an opponent is among the smallest, whether or not its influence is below 0.
    """
    keys = _sortable(score).topk(min(k, score.shape[1]), dim=1)
    return keys.indices.masked_fill(keys.values == _NAN_KEY, NONE)


def _sortable(score: Tensor) -> Tensor:
    """Integers in the order of (score, lower column first), all different: the order of a top-k is then defined."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0 makes −0.0 the 0.0 that it equals.
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    below = torch.arange(score.shape[1] - 1, -1, -1, device=score.device)
    return ((ascending << _COLUMN_BITS) + below).masked_fill(score.isnan(), _NAN_KEY)


def without_self(
    score: Float32[Tensor, "query column"], class_id: int, start: int, train: int
) -> Float32[Tensor, "query column"]:
    """The scores of train queries, with NaN for the influence of each region on itself.

    The queries are the regions of a class on the train slices from position ``start``; their own columns are
    ``(class_id − 1) · train + position``, of ``train`` slices.
    """
    queries = torch.arange(len(score), device=score.device)
    own = score.clone()
    own[queries, (class_id - 1) * train + start + queries] = torch.nan
    return own


def without_zeros(score: Float32[Tensor, "query column"]) -> Float32[Tensor, "query column"]:
    """The scores, with NaN for queries on which every influence is 0: ranking them would rank the columns' numbers.

    The gradient of such a region is 0, above all where no pixel of it is of its class in the ground truth.
    """
    nothing = ((score == 0) | score.isnan()).all(dim=1, keepdim=True)
    return score.masked_fill(nothing, torch.nan)


def count_lists(lists: Int64[Tensor, "query rank"], columns: int) -> Int64[Tensor, " column"]:
    """In how many lists each train region stands."""
    return torch.bincount(lists[lists != NONE], minlength=columns)


def list_shares(counts: Int64[Tensor, "*shape"], lists: Int64[Tensor, "*#shape"]) -> Float64[Tensor, "*shape"]:
    """The share of so many lists in which something stands; NaN without a list."""
    return counts.double() / lists.double()


def find_global(
    share_proponent: Float64[Tensor, "*shape"], share_opponent: Float64[Tensor, "*shape"], max_share: float
) -> Bool[Tensor, "*shape"]:
    """The global explainers (section 3.5): train regions with a share of either kind above ``max_share``."""
    return (share_proponent > max_share) | (share_opponent > max_share)


def local_ranks(lists: Int64[Tensor, "query rank"], is_global: Bool[Tensor, " column"]) -> Int64[Tensor, "query rank"]:
    """The rank of every list's entries, from 1, among those that are no global explainers; 0 for these and `NONE`."""
    local = (lists != NONE) & ~is_global[lists.clamp(min=0)]
    return torch.where(local, local.cumsum(1), 0)


def first_local(
    lists: Int64[Tensor, "query rank"], is_global: Bool[Tensor, " column"], k: int
) -> Bool[Tensor, "query rank"]:
    """Which entries are the first k that are no global explainers, or global ones that stand before the k-th of them.

    A list that has fewer than k such entries is taken whole. The k are complete where the list has ``k + number of
    global explainers`` places, or all regions.
    """
    local = local_ranks(lists, is_global) > 0
    before = local.cumsum(1) - local.long()
    return (lists != NONE) & (before < k)


def above_zero(key: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The key of a side without those who are not on it: NaN for all that isn't above 0."""
    return torch.where(key > 0, key, torch.nan)


def first_places(
    key: Float32[Tensor, "1 column"], left_out: Bool[Tensor, " column"], k: int
) -> tuple[Int64[Tensor, " place"], Int64[Tensor, " place"]]:
    """The columns of a query's k largest keys that are not left out, and their ranks among all columns, from 1."""
    lists = rank_regions(key, k + int(left_out.sum()))
    chosen = first_local(lists, left_out, k) & ~left_out[lists.clamp(min=0)]
    places = chosen[0].nonzero()[:, 0]
    return lists[0, places], places + 1


def count_classes(
    lists: Int64[Tensor, "query rank"],
    is_global: Bool[Tensor, " column"],
    train_classes: Int64[Tensor, " column"],
    length: int,
    classes: int,
) -> Int64[Tensor, " class"]:
    """How often each class stands among the first ``length`` entries that are no global explainers (figure 5)."""
    ranks = local_ranks(lists, is_global)
    chosen = lists[(ranks > 0) & (ranks <= length)]
    return torch.bincount(train_classes[chosen] - 1, minlength=classes)


def gradient_norms(
    norm2: Float[Tensor, "checkpoint *shape"], learning_rates: Float64[Tensor, " checkpoint"]
) -> Float64[Tensor, "*shape"]:
    """The norm of a region's gradients over all checkpoints, ``sqrt(Σ_t η_t |g_t|²)``, from squared norms at each.

    It is the square root of the self-influence; summed in float64, NaN where a region doesn't exist.
    """
    norm2_sum: Tensor = torch.tensordot(learning_rates, norm2.double(), dims=1)
    return norm2_sum.sqrt()


def cosine_influence(
    influence: Float32[Tensor, "query column"],
    query_norm: Float64[Tensor, " query"],
    train_norm: Float64[Tensor, " column"],
) -> Float32[Tensor, "query column"]:
    """Influence without the lengths of the gradients, in [−1, 1] up to rounding.

    ``cos = Σ_t η_t ⟨g'_t, g_t⟩ / sqrt(Σ_t η_t |g'_t|² · Σ_t η_t |g_t|²)``: the cosine of the angle between the
    gradients of all checkpoints in a row, each scaled by ``sqrt(η_t)``, of which eq. 6 is the inner product. It is one
    cosine over the checkpoints, not the mean of a cosine at each. NaN where a region doesn't exist or has no gradient.
    """
    undefined = (query_norm == 0)[:, None] | (train_norm == 0)
    cosine = influence.double() / query_norm[:, None] / train_norm
    return cosine.masked_fill(undefined, torch.nan).float()


def sum_by_patient(
    score: Float32[Tensor, "query column"],
    patient_of: Int64[Tensor, " column"],
    left_out: Bool[Tensor, " column"],
    patients: int,
) -> tuple[Float32[Tensor, "query patient"], Int64[Tensor, "query patient"]]:
    """The influence of a patient, the sum over the patient's regions, and how many these are.

    Their quotient is the mean. The sum says what the network would lack without the patient (to first order, eq. 6 is
    additive); the mean doesn't favour patients with many regions. ``left_out`` regions (global explainers) and NaN are
    in neither; a patient without a region is NaN. Summed in float64.
    """
    there = ~(score.isnan() | left_out)
    sums = torch.zeros(len(score), patients, dtype=torch.float64, device=score.device)
    sums.index_add_(1, patient_of, torch.where(there, score, 0.0).double())
    counts = torch.zeros(len(score), patients, dtype=torch.int64, device=score.device)
    counts.index_add_(1, patient_of, there.long())
    return sums.masked_fill(counts == 0, torch.nan).float(), counts
