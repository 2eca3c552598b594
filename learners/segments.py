"""Reductions over the sequences of a pack: [N] token values to one value per sequence.

Invariant: only loss tokens are seen, a sequence is never split over packs, and a sequence without
loss tokens gives 0; so results do not depend on the packing. Called by losses and credit.
"""

# ruff: noqa: F722 (shapes in annotations)

import torch
from jaxtyping import Float
from torch import Tensor

from learners.batch import MicroBatch

_WHOLE = 1e-6  # .8 * 35 is 28, whatever floating point makes of it


def sequence_sums(values: Float[Tensor, " N"], rows: MicroBatch) -> Float[Tensor, " S"]:
    """Differentiable sum over the loss tokens of each sequence."""
    zeros = values.new_zeros(len(rows.sequence_loss_tokens))
    return zeros.index_add(0, rows.sequence_ids, values)


def sequence_means(values: Float[Tensor, " N"], rows: MicroBatch) -> Float[Tensor, " S"]:
    """Differentiable mean over the loss tokens of each sequence."""
    return sequence_sums(values, rows) / rows.sequence_loss_tokens.clamp(min=1)


def sequence_quantiles(
    values: Float[Tensor, " N"], rows: MicroBatch, fraction: float
) -> Float[Tensor, " S"]:
    """Quantile of each sequence's values by linear interpolation, without gradient.

    One stable sort by value and one by sequence order all sequences at once: no loop over rows.
    """
    values = values.detach()
    by_value = values.argsort(stable=True)
    order = by_value[rows.sequence_ids[by_value].argsort(stable=True)]
    ordered = values[order]
    counts = rows.sequence_loss_tokens
    place = (counts - 1).clamp(min=0).double() * fraction
    whole = place.round()
    place = torch.where((place - whole).abs() < _WHOLE, whole, place)
    below = place.floor().long()
    weight = (place - below).to(values.dtype)
    above = torch.minimum(below + 1, (counts - 1).clamp(min=0))
    starts = counts.cumsum(0) - counts
    padded = torch.cat([ordered, ordered.new_zeros(1)])  # an empty last sequence starts at N
    low, high = padded[starts + below], padded[starts + above]
    return torch.where(counts > 0, low + weight * (high - low), torch.zeros_like(low))


def quantile(values: Float[Tensor, " M"], fraction: float) -> float:
    """Of M >= 1 values of any sequences, by linear interpolation."""
    ordered = values.sort().values
    place = (len(ordered) - 1) * fraction
    place = float(round(place)) if abs(place - round(place)) < _WHOLE else place
    below = int(place)
    low = ordered[below].item()
    high = ordered[min(below + 1, len(ordered) - 1)].item()
    return low + (place - below) * (high - low)


def reverse_sums(values: Float[Tensor, " N"], rows: MicroBatch) -> Float[Tensor, " N"]:
    """Sum over this and the later loss tokens of the same sequence; float64 inside, so that what
    lies before it in the pack does not show.
    """
    wide = values.double()
    totals = sequence_sums(wide, rows)
    before = wide.cumsum(0) - wide
    counts = rows.sequence_loss_tokens
    starts = counts.cumsum(0) - counts
    padded = torch.cat([before, before.new_zeros(1)])
    own_before = before - padded[starts][rows.sequence_ids]
    return (totals[rows.sequence_ids] - own_before).to(values.dtype)


def discounted_sums(
    values: Float[Tensor, " N"], factors: Float[Tensor, " N"], rows: MicroBatch
) -> Float[Tensor, " N"]:
    """S_t = value_t + factor_t S_(t+1), 0 after the last loss token of a sequence; float64 inside,
    without gradient.

    In ceil(log2 of the longest) passes over all tokens at once: after a pass each sum reaches twice
    as far. Values [1, 1, 1] of one sequence with factor .5: [1.75, 1.5, 1].
    """
    sums, scales = values.detach().double(), factors.detach().double()
    is_last = torch.ones_like(rows.sequence_ids, dtype=torch.bool)
    is_last[:-1] = rows.sequence_ids[1:] != rows.sequence_ids[:-1]
    scales = scales.masked_fill(is_last, 0.0)
    reach = 1
    while reach < max(rows.lengths):
        later_sums, later_scales = torch.zeros_like(sums), torch.zeros_like(scales)
        later_sums[:-reach], later_scales[:-reach] = sums[reach:], scales[reach:]
        sums, scales = sums + scales * later_sums, scales * later_scales
        reach *= 2
    return sums.to(values.dtype)
