"""Objectives: losses over the tokens that the policy wrote (extension point P5).

Invariant: an objective returns an unnormalised sum, and says which global count divides it; so the
loss of an update does not depend on micro-batches, ranks or the order in which groups arrived. An
objective that needs a number of the whole batch before its gradient implements `Surveying`. Called
by the learner for each micro-batch, also for empty ones.
"""

# ruff: noqa: F722 (shapes in annotations)

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cluster.config import ObjectiveSection
from cluster.errors import ConfigError
from cluster.plugins import build
from learners import mismatch
from learners.aggregation import Denominator
from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.nucleus import Nucleus
from learners.step_sums import Mean

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


@dataclass(frozen=True)
class LossTerm:
    """A scalar sum with gradient, and metrics, each a mean over the tokens that it is of.

    `reported` replaces `total` in the metrics where the two differ: a linearised loss has the
    right gradient and another value.
    """

    total: Float[Tensor, ""]
    metrics: dict[str, Mean] = field(default_factory=dict)
    reported: Float[Tensor, ""] | None = None


class Objective(Protocol):
    """May also have `nucleus` (a `Nucleus`: fill `outputs.nucleus_entropy`), and what is False
    unless it says True: `needs_reference` (fill `rows.ref_logprobs` from the frozen initial
    policy), `needs_sampled_context` (fill `rows.sampled_logprobs` of guided rows), `takes_guided`
    (it is right for rows whose `rollout_logprobs` are of another context), `needs_outcome_credit`
    (all tokens of a sequence must have one advantage), `needs_several_updates` (a step of a single
    update teaches nothing). `needs_proximal` is True unless it says False: a step of several
    updates then spares the pass for `rows.proximal_logprobs`. One that is `Surveying` with
    `needs_survey` False is not asked.
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


class LossSums(NamedTuple):
    """`total` is what to run backward on; `losses` has each loss by its name, and "total";
    `largest_gap` is the largest |log proximal / rollout|.

    Of `means` a metric that several losses have is that of the first; the others have the name of
    their loss behind it.
    """

    total: Float[Tensor, ""]
    losses: dict[str, Float[Tensor, ""]]
    means: dict[str, Mean]
    largest_gap: Float[Tensor, ""]


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
        self.needs_reference = bool(self.with_flag("needs_reference"))
        self.needs_sampled_context = bool(self.with_flag("needs_sampled_context"))
        self.needs_proximal = any(
            getattr(objective, "needs_proximal", True) for objective in self._objectives.values()
        )
        self.needs_survey = any(
            isinstance(objective, Surveying) and getattr(objective, "needs_survey", True)
            for objective in self._objectives.values()
        )
        self._denominators: set[Denominator] = {
            objective.denominator for objective in self._objectives.values()
        }

    def with_flag(self, flag: str, is_set: bool = True) -> dict[str, str]:
        """Names of the losses that say `flag`, or do not, with the `use` of each."""
        return {
            name: self._uses[name]
            for name, objective in self._objectives.items()
            if bool(getattr(objective, flag, False)) is is_set
        }

    @property
    def objectives(self) -> list[Objective]:
        return [*self._objectives.values()]

    def require_guided(self) -> None:
        """Raise `ConfigError` naming every loss that is wrong for guided rows."""
        wrong = [
            f"objective.losses.{name}: {use} would take the hint that rollout.program "
            "strips, or the text that it gives, for a step of the policy, and clip it: use guide, "
            "or a program that leaves the hint in place (settings: strip false, or place "
            "completion) and has nothing given learned (learn false)"
            for name, use in self.with_flag("takes_guided", is_set=False).items()
        ]
        if wrong:
            raise ConfigError("\n".join(wrong))

    def refuse_token_credit(self) -> None:
        """Raise `ConfigError` naming a loss that would average what credit says of tokens."""
        for name, use in self.with_flag("needs_outcome_credit").items():
            raise ConfigError(
                f"objective.losses.{name}: {use} has one advantage per sequence, and "
                "objective.credit gives one per token: use grpo, rloo or reinforce_pp"
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
    ) -> LossSums:
        """Of one micro-batch. With the global `counts` each loss is divided by its own, without
        them by none (their common one divides later).
        """
        entropies = {"policy/entropy": outputs.entropy}
        if self.nucleus is not None:
            entropies["policy/nucleus_entropy"] = outputs.nucleus_entropy
        gap, is_compared = mismatch.gaps(rows, outputs)
        means = mismatch.means(gap, is_compared) | {
            name: Mean(values.detach().sum(), rows.num_loss_tokens)
            for name, values in entropies.items()
        }
        losses: dict[str, Tensor] = {}
        total = reported = outputs.logprobs.new_zeros(())
        for name, (weight, objective) in self._losses.items():
            term = objective.loss(rows, outputs)
            scale = 1.0 if counts is None else 1.0 / max(1.0, counts[objective.denominator])
            total = total + weight * scale * term.total
            value = (term.total if term.reported is None else term.reported).detach() * scale
            losses[name] = value
            reported = reported + weight * value
            means |= {
                metric if metric not in means else f"{metric}/{name}": mean
                for metric, mean in term.metrics.items()
            }
        largest = torch.cat([gap.abs(), gap.new_zeros(1)]).max()
        return LossSums(total, losses | {"total": reported}, means, largest)

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
