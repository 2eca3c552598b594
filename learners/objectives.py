"""Objectives: losses over the tokens that the policy wrote (extension point P5).

Invariant: an objective returns an unnormalised sum, and says which global count divides it; so the
loss of a step does not depend on micro-batches, ranks or the order in which groups arrived. Called
by the learner for each micro-batch, also for empty ones.
"""

# ruff: noqa: F722 (shapes in annotations)

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from cluster.config import ObjectiveSection
from cluster.errors import ConfigError
from cluster.plugins import build
from learners.batch import MicroBatch

OBJECTIVES = {"policy_gradient": "learners.objectives:PolicyGradient"}

Denominator = Literal["tokens", "sequences"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "constant"]
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossTerm:
    """A scalar sum with gradient, and metrics as detached sums over the loss tokens."""

    total: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


class Objective(Protocol):
    denominator: Denominator  # global count that divides `total`: loss tokens, or their sequences

    def loss(
        self,
        rows: MicroBatch,
        learner_logprobs: Float[Tensor, " N"],
        entropy: Float[Tensor, " N"],
    ) -> LossTerm:
        """Sum over the N loss tokens of `rows`; must be 0 with a graph when N = 0."""
        ...


class PolicyGradient:
    """Clipped policy gradient: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r against
    rollouts.

    PPO clipping (arXiv 1707.06347) with the wider upper bound of DAPO (arXiv 2503.14476). The ratio
    is taken against `rollout_logprobs`, so it corrects policy age and engine mismatch at once.
    `dual_clip` c > 1 bounds the loss of negative advantages at c |A| (arXiv 1912.09729).
    `importance_cap` truncates the ratio's weight, keeping the token's gradient (arXiv 1802.01561).
    `aggregation`: token_mean divides by all loss tokens (DAPO); seq_mean_token_mean averages each
    sequence first (GRPO); constant divides each sequence's sum by `constant` (Dr. GRPO). With r =
    1.35, A = 1 the loss is -1.28 and its gradient 0.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        dual_clip: float | None = None,
        importance_cap: float | None = None,
        aggregation: Aggregation = "token_mean",
        constant: int | None = None,
    ) -> None:
        if not 0 <= clip_low < 1 or clip_high < 0:
            raise ValueError(
                f"clip_low must be in [0, 1) and clip_high >= 0, got {clip_low}, {clip_high}"
            )
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
        if importance_cap is not None and importance_cap < 1:
            raise ValueError(f"importance_cap must be at least 1, got {importance_cap}")
        known = ("token_mean", "seq_mean_token_mean", "constant")
        if aggregation not in known:
            raise ValueError(f"aggregation must be one of {', '.join(known)}, got {aggregation!r}")
        if (aggregation == "constant") != (constant is not None) or (constant or 1) <= 0:
            raise ValueError(
                "constant must be a positive number of tokens with aggregation=constant, and unset "
                f"otherwise; got constant={constant}, aggregation={aggregation}"
            )
        self.denominator: Denominator = "tokens" if aggregation == "token_mean" else "sequences"
        self._aggregation = aggregation
        self._constant = constant
        self._low, self._high = 1 - clip_low, 1 + clip_high
        self._dual_clip = dual_clip
        self._importance_cap = importance_cap

    def loss(
        self,
        rows: MicroBatch,
        learner_logprobs: Float[Tensor, " N"],
        entropy: Float[Tensor, " N"],
    ) -> LossTerm:
        log_ratio = (learner_logprobs - rows.rollout_logprobs).clamp(
            -_MAX_LOG_RATIO, _MAX_LOG_RATIO
        )
        ratio = log_ratio.exp()
        importance = ratio.detach()
        if self._importance_cap is not None:
            ratio = ratio * (self._importance_cap / importance).clamp(max=1)
        plain = -ratio * rows.advantages
        clipped = -ratio.clamp(self._low, self._high) * rows.advantages
        losses = torch.maximum(plain, clipped)
        if self._dual_clip is not None:
            bound = -self._dual_clip * rows.advantages
            losses = torch.where(rows.advantages < 0, torch.minimum(losses, bound), losses)
        return LossTerm(
            total=self._aggregate(losses, rows),
            metrics={
                "ratio/importance_mean": importance.sum(),
                "ratio/clip_fraction": (losses != plain).sum(),
            },
        )

    def _aggregate(self, losses: Tensor, rows: MicroBatch) -> Tensor:
        if self._aggregation == "seq_mean_token_mean":
            losses = losses / rows.sequence_loss_tokens[rows.sequence_ids]
        elif self._constant is not None:
            losses = losses / self._constant
        return losses.sum()


class WeightedLosses:
    """All losses of a run: their weighted sum, and the sums behind the step's metrics."""

    def __init__(self, section: ObjectiveSection) -> None:
        self._losses: dict[str, tuple[float, Objective]] = {
            name: (
                loss.weight,
                build(loss.use, loss.settings, OBJECTIVES, f"objective.losses.{name}"),
            )
            for name, loss in section.losses.items()
        }
        kinds: dict[str, Denominator] = {
            name: objective.denominator for name, (_, objective) in self._losses.items()
        }
        if len(set(kinds.values())) > 1:
            raise ConfigError(
                "objective.losses: gradients accumulate before the counts are known, so all losses "
                f"must be divided by the same count; got {kinds}"
            )
        self.denominator = next(iter(kinds.values()))

    def sums(
        self,
        rows: MicroBatch,
        learner_logprobs: Float[Tensor, " N"],
        entropy: Float[Tensor, " N"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The total to run backward on, and every metric of the micro-batch as a detached sum.

        `ratio/mismatch_kl` is the k3 estimate of KL(rollout || learner), from tokens of the
        rollout.
        """
        gap = learner_logprobs.detach() - rows.rollout_logprobs
        sums = {
            "ratio/mismatch_kl": (gap.clamp(max=_MAX_LOG_RATIO).exp() - 1 - gap).sum(),
            "ratio/mismatch_abs_mean": gap.abs().sum(),
            "policy/entropy": entropy.detach().sum(),
        }
        total = learner_logprobs.new_zeros(())
        for name, (weight, objective) in self._losses.items():
            term = objective.loss(rows, learner_logprobs, entropy)
            total = total + weight * term.total
            sums[f"loss/{name}"] = term.total.detach()
            sums.update(term.metrics)
        sums["loss/total"] = total.detach()
        return total, sums
