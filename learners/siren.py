"""SIREN: selective, self-anchored entropy regularisation (arXiv 2509.25133).

Invariant: the penalty beta (H - H0)^2 is of the whole update. Its gradient is that of the linear
term sg(2 beta (H - H0)) H, whose factor is known from a survey of the update before any gradient;
so it is exact under accumulation and over ranks, where a mean of squares of micro-batches would add
their variance. Rows are never mixed: nothing is kept but one number per sequence.
"""

# ruff: noqa: F722 (shapes in annotations)

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learners.aggregation import Denominator
from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.nucleus import Nucleus, NucleusRule
from learners.objectives import LossTerm
from learners.segments import sequence_quantiles, sequence_sums
from learners.step_sums import Mean


class Siren:
    """beta (H - H0)^2, H the mean over sequences of the mean nucleus entropy of their peak tokens.

    Peak tokens are those strictly above the `peak_quantile` of their own sequence, so never one
    that ties with it; a sequence without any counts as 0. A nucleus of one token has exactly 0:
    where so few tokens have a choice that the quantile is 0, the peaks are these few. H0, the
    anchor, is the H of the first step, all its mini-batches together and hinted rows left out,
    unless `anchor` gives it; it then stays for the run and goes into checkpoints. `peak_quantile` 0
    takes all tokens, `nucleus_mass` 1 the full entropy. `beta` is to be seen against the normaliser
    of the policy loss: the source's .005 goes with aggregation=constant. Entropies [.1, .9, .3, .7,
    .2] and [.4, .6, 0, .2] with H0 = .5: H = .75, penalty 3.125e-4.
    """

    denominator: Denominator = "sequences"
    needs_proximal = False
    takes_guided = True

    def __init__(
        self,
        beta: float = 0.005,
        peak_quantile: float = 0.8,
        nucleus_mass: float = 0.8,
        nucleus_rule: NucleusRule = "crossing_in",
        anchor: float | None = None,
    ) -> None:
        if not 0 <= peak_quantile < 1:
            raise ValueError(f"peak_quantile must be in [0, 1), got {peak_quantile}")
        if anchor is not None and not (math.isfinite(anchor) and anchor >= 0):
            raise ValueError(f"anchor must be an entropy >= 0 in nats, got {anchor}")
        if beta < 0:
            raise ValueError(f"beta must be >= 0, got {beta}")
        self.nucleus = Nucleus(nucleus_mass, nucleus_rule)
        self._beta = beta
        self._peak_quantile = peak_quantile
        self._anchor = anchor
        self._factor = self._penalty = 0.0

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "S 2"]:
        """Per sequence with loss tokens: its peak entropy, and 1 where it had no hint."""
        entropy = outputs.nucleus_entropy.detach()
        means = _means(entropy, self.is_peak(rows, outputs), rows).double()
        is_hinted = sequence_sums(rows.is_hinted.double(), rows) > 0
        return torch.stack([means, (~is_hinted).double()], -1)[rows.sequence_loss_tokens > 0]

    @property
    def needs_anchor(self) -> bool:
        return self._anchor is None

    def anchor(self, table: Float[Tensor, "S 2"]) -> None:
        entropies, is_plain = table[:, 0], table[:, 1] > 0
        if self._anchor is None and is_plain.any():
            mean = entropies[is_plain].mean().item()
            self._anchor = mean if math.isfinite(mean) else None

    def begin(self, table: Float[Tensor, "S 2"]) -> dict[str, float]:
        self._factor = self._penalty = 0.0
        if len(table) == 0:
            return {}
        self.anchor(table)
        peak_entropy = table[:, 0].mean().item()
        metrics = {"siren/peak_entropy": peak_entropy}
        if self._anchor is not None:
            gap = peak_entropy - self._anchor
            self._factor, self._penalty = 2 * self._beta * gap, self._beta * gap**2
            metrics["siren/anchor"] = self._anchor
        return metrics

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        is_peak = self.is_peak(rows, outputs)
        total = self._factor * _means(outputs.nucleus_entropy, is_peak, rows).sum()
        return LossTerm(
            total,
            metrics={"siren/peak_fraction": Mean(is_peak.sum(), rows.num_loss_tokens)},
            reported=torch.full_like(total, self._penalty * rows.num_sequences),
        )

    def state(self) -> list[float]:
        return [math.nan if self._anchor is None else self._anchor]

    def restore(self, state: list[float]) -> None:
        [anchor] = state
        self._anchor = None if math.isnan(anchor) else anchor

    def is_peak(self, rows: MicroBatch, outputs: TokenOutputs) -> Bool[Tensor, " N"]:
        """Whether a token's nucleus entropy is above the quantile of its own sequence."""
        entropy = outputs.nucleus_entropy.detach()
        if self._peak_quantile == 0:
            return torch.ones_like(entropy, dtype=torch.bool)
        thresholds = sequence_quantiles(entropy, rows, self._peak_quantile)
        return entropy > thresholds[rows.sequence_ids]


def _means(
    values: Float[Tensor, " N"], is_chosen: Bool[Tensor, " N"], rows: MicroBatch
) -> Float[Tensor, " S"]:
    """Mean of the chosen values of each sequence, 0 where there are none."""
    chosen = is_chosen.to(values.dtype)
    return sequence_sums(values * chosen, rows) / sequence_sums(chosen, rows).clamp(min=1)
