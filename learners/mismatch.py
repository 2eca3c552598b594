"""How far the proximal policy, the learner at the start of a step, is from the one that sampled.

Invariant: both are compared in the context that was sampled from, so a hint is no mismatch, and a
token whose log-prob is not known there is in no mean; nor is one in a later update of a step that
no loss needed a proximal pass for. Measured by the learner on every step.
"""

# ruff: noqa: F722 (shapes in annotations)

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.off_policy import MAX_LOG, proximal_logprobs
from learners.step_sums import Mean

WEIGHT, WEIGHT_SQUARE = "w", "w^2"  # until they are all summed up


def gaps(rows: MicroBatch, outputs: TokenOutputs) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """log of proximal / rollout without gradient, both in the context that was sampled from, and
    where that is known; it is 0 on guided tokens whose log-probs in that no loss asked for, and on
    given ones.
    """
    if rows.is_later_update and rows.proximal_logprobs is None:
        return torch.zeros_like(rows.rollout_logprobs), torch.zeros_like(rows.is_guided)
    proximal = proximal_logprobs(rows, outputs).detach()
    is_known = ~rows.is_guided
    if rows.sampled_logprobs is not None:
        proximal = torch.where(rows.is_guided, rows.sampled_logprobs, proximal)
        is_known = ~rows.is_given
    return torch.where(is_known, proximal - rows.rollout_logprobs, 0.0), is_known


def means(gap: Float[Tensor, " N"], is_compared: Bool[Tensor, " N"]) -> dict[str, Mean]:
    """Of w = proximal / rollout on the compared tokens, `gap` = log w.

    `mismatch_kl` is the k3 estimate of KL(rollout || proximal), from tokens of the rollout,
    `mismatch_k1` the k1 estimate, whose exp is the perplexity ratio, `mismatch_probability_error`
    the mean of exp |log w|; `WEIGHT` and `WEIGHT_SQUARE` are for the effective sample size.
    """
    near = gap.clamp(-MAX_LOG, MAX_LOG)
    weights = torch.where(is_compared, near.exp(), 0.0)
    sums = {
        "ratio/mismatch_kl": (gap.clamp(max=MAX_LOG).exp() - 1 - gap).sum(),
        "ratio/mismatch_k1": -gap.sum(),
        "ratio/mismatch_abs_mean": gap.abs().sum(),
        "ratio/mismatch_probability_error": torch.where(is_compared, near.abs().exp(), 0.0).sum(),
        WEIGHT: weights.sum(),
        WEIGHT_SQUARE: weights.square().sum(),
    }
    count = is_compared.sum()
    return {name: Mean(total, count) for name, total in sums.items()}
