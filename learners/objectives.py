"""Objectives: losses over the tokens that the policy wrote (extension point P5).

Invariant: an objective returns an unnormalised sum, and says which global count divides it; so the
loss of an update does not depend on micro-batches, ranks or the order in which groups arrived. An
objective that needs a number of the whole batch before its gradient implements `Surveying`. Called
by the learner for each micro-batch, also for empty ones.
"""

# ruff: noqa: F722 (shapes in annotations)

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cluster.config import ObjectiveSection
from cluster.errors import ConfigError
from cluster.plugins import build
from learners.aggregation import Denominator
from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.nucleus import Nucleus
from learners.off_policy import proximal_logprobs

OBJECTIVES = {
    "policy_gradient": "learners.surrogates:PolicyGradient",
    "gspo": "learners.surrogates:SequencePolicyGradient",
    "cispo": "learners.surrogates:ClippedImportance",
    "gmpo": "learners.surrogates:GeometricMean",
    "sapo": "learners.surrogates:SoftAdaptive",
    "guide": "learners.guidance:GuidedPolicyGradient",
    "kl": "learners.kl:KLPenalty",
    "siren": "learners.siren:Siren",
    "entropy_bonus": "learners.entropy:EntropyBonus",
    "adaptive_entropy": "learners.entropy:AdaptiveEntropyBonus",
    "kl_cov": "learners.entropy:CovarianceKL",
    "entropy_advantage": "learners.entropy:EntropyShapedGradient",
}

COMPARED = (
    "ratio/mismatch_kl", "ratio/mismatch_k1", "ratio/mismatch_abs_mean", "ratio/mismatch_abs_max",
    "ratio/mismatch_probability_error",
)  # fmt: skip
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossTerm:
    """A scalar sum with gradient, and metrics as detached sums over the loss tokens; those named
    `guide/...` are over the guided ones, `policy/reference_kl` over the others.

    `reported` replaces `total` in the metrics where the two differ: a linearised loss has the
    right gradient and another value.
    """

    total: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    reported: Float[Tensor, ""] | None = None


class Objective(Protocol):
    """May also have `needs_reference = True` (fill `rows.ref_logprobs` from the frozen initial
    policy), `needs_sampled_context = True` (fill `rows.sampled_logprobs` of guided rows),
    `takes_guided = True` (it is right for rows whose `rollout_logprobs` are of another context) and
    `nucleus` (a `Nucleus`: fill `outputs.nucleus_entropy`).
    """

    denominator: Denominator  # global count that divides `total`: loss tokens, or their sequences

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        """Sum over the N loss tokens of `rows`; must be 0 with a graph when N = 0."""
        ...


@runtime_checkable
class Surveying(Protocol):
    """An objective that must see all of an update before its gradients: a global mean or quantile.

    For each update: `survey` on every micro-batch of every rank without gradients, then `begin`
    once with all rows together (the same on every rank), then `loss` on every micro-batch.
    """

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "M C"] | None:
        """Any number of rows of C float64 columns; None asks for no pass over the batch."""
        ...

    def begin(self, table: Float[Tensor, "M C"]) -> dict[str, float]:
        """Take in the survey of the whole update; returns metrics to log as they are."""
        ...


@runtime_checkable
class Anchored(Protocol):
    """A surveying objective that compares with the policy it began with. While `needs_anchor`, a
    step of several updates hands it the survey of all of them before the first.
    """

    @property
    def needs_anchor(self) -> bool: ...

    def anchor(self, table: Float[Tensor, "M C"]) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """An objective whose numbers go into the checkpoint; all ranks hold the same."""

    def state(self) -> list[float]: ...

    def restore(self, state: list[float]) -> None: ...


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
        self._uses = {name: loss.use for name, loss in section.losses.items()}
        self._objectives: dict[str, Objective] = {
            name: objective for name, (_, objective) in self._losses.items()
        }
        nuclei = {
            nucleus
            for objective in self._objectives.values()
            if (nucleus := getattr(objective, "nucleus", None)) is not None
        }
        if len(nuclei) > 1:
            raise ConfigError(f"objective.losses: all must use one nucleus, got {nuclei}")
        self.nucleus: Nucleus | None = next(iter(nuclei), None)
        self.needs_reference = any(
            getattr(objective, "needs_reference", False) for objective in self._objectives.values()
        )
        self.needs_sampled_context = any(
            getattr(objective, "needs_sampled_context", False)
            for objective in self._objectives.values()
        )
        self.needs_survey = any(
            isinstance(objective, Surveying) and getattr(objective, "needs_survey", True)
            for objective in self._objectives.values()
        )
        self._denominators: set[Denominator] = {
            objective.denominator for objective in self._objectives.values()
        }

    @property
    def objectives(self) -> list[Objective]:
        return [*self._objectives.values()]

    def require_guided(self) -> None:
        """Raise `ConfigError` naming every loss that is wrong for guided rows."""
        wrong = [
            f"objective.losses.{name}: {self._uses[name]} would take the hint that rollout.program "
            "strips for a step of the policy, and clip it: use guide, or a program that leaves the "
            "hint in place (settings: strip false, or place completion)"
            for name, objective in self._objectives.items()
            if not getattr(objective, "takes_guided", False)
        ]
        if wrong:
            raise ConfigError("\n".join(wrong))

    def refuse_token_credit(self) -> None:
        """Raise `ConfigError` naming a loss that would average what credit says of tokens."""
        for name, objective in self._objectives.items():
            if getattr(objective, "needs_outcome_credit", False):
                raise ConfigError(
                    f"objective.losses.{name}: {self._uses[name]} has one advantage per sequence, "
                    "and objective.credit gives one per token: use grpo, rloo or reinforce_pp"
                )

    @property
    def common_denominator(self) -> Denominator | None:
        """The count that divides every loss; None when they differ, so that counts must be known
        before the first gradient.
        """
        return next(iter(self._denominators)) if len(self._denominators) == 1 else None

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> dict[str, Tensor]:
        """What each surveying objective wants to know of this micro-batch, by name."""
        return {
            name: table
            for name, objective in self._objectives.items()
            if isinstance(objective, Surveying)
            and (table := objective.survey(rows, outputs)) is not None
        }

    def begin(self, tables: Mapping[str, Tensor]) -> dict[str, float]:
        """Hand every objective the whole update's survey; returns their metrics."""
        metrics: dict[str, float] = {}
        for name, table in tables.items():
            metrics |= cast(Surveying, self._objectives[name]).begin(table)
        return metrics

    @property
    def needs_anchor(self) -> bool:
        return any(
            isinstance(objective, Anchored) and objective.needs_anchor
            for objective in self._objectives.values()
        )

    def anchor(self, tables: Mapping[str, Tensor]) -> None:
        """Hand the survey of a whole step to those that need it; the others learn nothing."""
        for name, table in tables.items():
            objective = self._objectives[name]
            if isinstance(objective, Anchored):
                objective.anchor(table)

    def sums(
        self,
        rows: MicroBatch,
        outputs: TokenOutputs,
        counts: Mapping[Denominator, float] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The total to run backward on, and every metric of the micro-batch as a detached sum.

        With the global `counts` each loss is divided by its own, without them by none (their
        common one divides later). `ratio/mismatch_kl` is the k3 estimate of KL(rollout ||
        proximal), from tokens of the rollout, `ratio/mismatch_k1` the k1 estimate, whose exp is the
        perplexity ratio, `..._probability_error` the mean of exp |log w|. `mismatch_weights` and
        their squares are sums of w = proximal / rollout over the `num_compared_tokens`, for their
        effective sample size.
        """
        gap, is_compared = _mismatch(rows, outputs)
        weights = gap.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp() * is_compared
        sums = {
            "ratio/mismatch_kl": (gap.clamp(max=_MAX_LOG_RATIO).exp() - 1 - gap).sum(),
            "ratio/mismatch_k1": -gap.sum(),
            "ratio/mismatch_abs_mean": gap.abs().sum(),
            "ratio/mismatch_probability_error": torch.where(
                is_compared, gap.abs().clamp(max=_MAX_LOG_RATIO).exp(), 0.0
            ).sum(),
            "ratio/mismatch_abs_max": torch.cat([gap.abs(), gap.new_zeros(1)]).max(),
            "mismatch_weights": weights.sum(),
            "mismatch_weight_squares": weights.square().sum(),
            "num_compared_tokens": is_compared.sum(),
            "policy/entropy": outputs.entropy.detach().sum(),
        }
        if self.nucleus is not None:
            sums["policy/nucleus_entropy"] = outputs.nucleus_entropy.detach().sum()
        total = reported = outputs.logprobs.new_zeros(())
        for name, (weight, objective) in self._losses.items():
            term = objective.loss(rows, outputs)
            scale = 1.0 if counts is None else 1.0 / max(1.0, counts[objective.denominator])
            total = total + weight * scale * term.total
            value = (term.total if term.reported is None else term.reported).detach() * scale
            sums[f"loss/{name}"] = value
            reported = reported + weight * value
            sums.update(term.metrics)
        sums["loss/total"] = reported
        return total, sums

    def state(self) -> dict[str, Tensor]:
        """Numbers that belong into a checkpoint, float64, by the name of their loss."""
        return {
            name: torch.tensor(objective.state(), dtype=torch.float64)
            for name, objective in self._objectives.items()
            if isinstance(objective, Stateful)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, values in state.items():
            objective: Any = self._objectives[name]
            objective.restore(values.tolist())


def _mismatch(
    rows: MicroBatch, outputs: TokenOutputs
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """log of proximal / rollout without gradient, both in the context that was sampled from, and
    where that is known; it is 0 on guided tokens whose log-probs in that no loss asked for.
    """
    proximal = proximal_logprobs(rows, outputs).detach()
    is_known = ~rows.is_guided
    if rows.sampled_logprobs is not None:
        proximal = torch.where(rows.is_guided, rows.sampled_logprobs, proximal)
        is_known = torch.ones_like(is_known)
    return torch.where(is_known, proximal - rows.rollout_logprobs, 0.0), is_known
