"""Importance weights between the policy that sampled and the one the update starts from.

Three policies are kept apart: rollout (the engine that sampled, perhaps several versions ago),
proximal (the learner at the start of the step, or one that is interpolated) and learner (the one
with a gradient). Invariant: weights carry no gradient and multiply the numerator only, so a
rejected token still counts in the denominator. Called by the surrogates.
"""

# ruff: noqa: F722 (shapes in annotations)

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cluster.errors import ConfigError
from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.segments import sequence_means, sequence_sums
from learners.step_sums import Mean

Level = Literal["token", "sequence", "geometric"]
Action = Literal["truncate", "mask"]
RatioTo = Literal["rollout", "proximal", "interpolated"]
MAX_LOG = 20.0  # of any log-ratio, on either side


def log_ratio(rows: MicroBatch, outputs: TokenOutputs, to: RatioTo) -> Float[Tensor, " N"]:
    """log of learner / `to`, with gradient, within +-20."""
    return (outputs.logprobs - base_logprobs(rows, outputs, to)).clamp(-MAX_LOG, MAX_LOG)


def base_logprobs(rows: MicroBatch, outputs: TokenOutputs, to: RatioTo) -> Float[Tensor, " N"]:
    """Log-probs of `to`, without gradient.

    `interpolated` is A-3PO (arXiv 2512.06547), which needs no pass of its own: rollout + age /
    (age + 1) * (learner - rollout). The proximal policy is the one at the start of the step, from
    which age counts, and the learner one version on. With log-probs -1.3 and -.9 and an age of 2
    that is -1.033333.
    """
    if to == "rollout":
        return rows.rollout_logprobs
    if to == "proximal":
        return proximal_logprobs(rows, outputs)
    share = rows.policy_age / (rows.policy_age + 1)
    return rows.rollout_logprobs + share * (outputs.logprobs.detach() - rows.rollout_logprobs)


def proximal_logprobs(rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, " N"]:
    """Log-probs of the learner at the start of the step: its present ones when this is the first
    update of the step, so that no extra pass is needed.

    Raises `ConfigError` in a later update when the pass was spared.
    """
    if rows.proximal_logprobs is not None:
        return rows.proximal_logprobs
    if rows.is_later_update:
        raise ConfigError("a loss that reads the proximal policy must not say needs_proximal False")
    return outputs.logprobs.detach()


@dataclass(frozen=True)
class RolloutCorrection:
    """w = proximal / rollout, made safe: truncated to at most `high` or set to 0 outside of [`low`,
    `high`]. Of an interpolated policy where the ratio is taken against that.

    level token: truncated importance sampling (TIS) and its masked form (IcePop); level sequence
    takes the product over the sequence for all its tokens (arXiv 2505.24298 discusses the
    former); level geometric masks whole sequences by exp(mean log w) and keeps the tokens' own w.
    `age_halflife` h multiplies by 2^(-age / h), age in policy versions. Log-weights 1, -1, .5 with
    truncation at 2 give 2, .3679, 1.6487; masked to [.5, 5]: 2.7183, 0, 1.6487.
    """

    level: Level = "token"
    action: Action = "truncate"
    high: float = 2.0
    low: float = 0.0
    age_halflife: float | None = None

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(
                f"correction.level must be one of {', '.join(get_args(Level))}, got {self.level!r}"
            )
        if self.action not in get_args(Action):
            raise ValueError(f"correction.action must be truncate or mask, got {self.action!r}")
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"correction must have 0 <= low < high, got low={self.low}, high={self.high}"
            )
        if self.action == "truncate" and self.low > 0:
            raise ValueError("correction.low belongs to action=mask, got it with truncate")
        if self.level == "geometric" and self.action == "truncate":
            raise ValueError("correction.level=geometric needs action=mask")
        if self.age_halflife is not None and self.age_halflife <= 0:
            raise ValueError(f"correction.age_halflife must be positive, got {self.age_halflife}")

    def weights(
        self, rows: MicroBatch, base: Float[Tensor, " N"], is_corrected: Bool[Tensor, " N"]
    ) -> tuple[Float[Tensor, " N"], dict[str, Mean]]:
        """Weights without gradient from the log-probs `base` of the proximal policy, and metrics
        over the tokens that `is_corrected` names.
        """
        logs = (base.detach() - rows.rollout_logprobs).clamp(-MAX_LOG, MAX_LOG)
        if self.level == "token":
            judged = logs
        else:
            reduce = sequence_sums if self.level == "sequence" else sequence_means
            judged = reduce(logs, rows)[rows.sequence_ids].clamp(-MAX_LOG, MAX_LOG)
        judged = judged.exp()
        weights = logs.exp() if self.level == "geometric" else judged
        if self.action == "truncate":
            is_changed = judged > self.high
            weights = weights.clamp(max=self.high)
        else:
            is_changed = (judged < self.low) | (judged > self.high)
            weights = torch.where(is_changed, 0.0, weights)
        count = is_corrected.sum()
        metrics = {
            "ratio/rollout_weight_mean": Mean(torch.where(is_corrected, weights, 0.0).sum(), count),
            "ratio/corrected_fraction": Mean((is_changed & is_corrected).sum(), count),
        }
        if self.age_halflife is not None:
            weights = weights * torch.exp2(-rows.policy_age / self.age_halflife)
        return weights, metrics
