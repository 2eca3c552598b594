"""Entropy terms to compare SIREN with: bonuses plain and adaptive, KL-Cov, shaped advantages.

Invariant: statistics that decide are taken over the whole update without gradient; only the bonuses
let gradients through the entropy. All are objectives (`learners.objectives`).
"""

# ruff: noqa: F722 (shapes in annotations)

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from learners.aggregation import Aggregation, Denominator, Name
from learners.batch import MicroBatch
from learners.covariance import Covariance
from learners.logprobs import TokenOutputs
from learners.objectives import LossTerm
from learners.off_policy import proximal_logprobs
from learners.surrogates import PolicyGradient


class EntropyBonus:
    """-coefficient times the mean full entropy of the loss tokens."""

    needs_proximal = False
    takes_guided = True

    def __init__(
        self,
        coefficient: float = 0.005,
        aggregation: Name = "token_mean",
        constant: int | None = None,
    ) -> None:
        self._coefficient = coefficient
        self._aggregation = Aggregation(aggregation, constant)
        self.denominator: Denominator = self._aggregation.denominator

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        return LossTerm(-self._coefficient * self._aggregation.sum(outputs.entropy, rows))


class AdaptiveEntropyBonus:
    """A bonus whose coefficient grows by `step` per update while the entropy is below `target` and
    shrinks otherwise; paid only while it is below (arXiv 2505.22312).

    Entropies .25, .15, .1, .3 with target .2 and step 1e-4 pay 0, 1e-4, 2e-4, 0.
    """

    denominator: Denominator = "tokens"
    needs_proximal = False
    takes_guided = True

    def __init__(self, target: float = 0.2, step: float = 1e-4, maximum: float = 0.005) -> None:
        if target <= 0 or step <= 0 or maximum <= 0:
            raise ValueError(
                "target, step and maximum must be positive, "
                f"got target={target}, step={step}, maximum={maximum}"
            )
        self._target, self._step, self._maximum = target, step, maximum
        self._coefficient = self._paid = 0.0

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "N 1"]:
        return outputs.entropy.detach().double()[:, None]

    def begin(self, table: Float[Tensor, "N 1"]) -> dict[str, float]:
        if len(table) == 0:
            return {}
        is_low = table.mean().item() < self._target
        moved = self._coefficient + (self._step if is_low else -self._step)
        self._coefficient = min(self._maximum, max(0.0, moved))
        self._paid = self._coefficient if is_low else 0.0
        return {"policy/entropy_coefficient": self._paid}

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        return LossTerm(-self._paid * outputs.entropy.sum())

    def state(self) -> list[float]:
        return [self._coefficient]

    def restore(self, state: list[float]) -> None:
        [self._coefficient] = state


class CovarianceKL:
    """KL-Cov (arXiv 2505.22617): coefficient * |log r| on the `fraction` of tokens with the highest
    covariance of advantage and log-prob, r against the proximal policy.

    It holds tokens back once the learner has left the proximal policy, so it needs
    learner.minibatches or learner.epochs above 1. Four tokens, fraction .25, log-ratios .1: .1 / 4.
    """

    denominator: Denominator = "tokens"
    takes_guided = True
    needs_several_updates = True

    def __init__(self, coefficient: float = 1.0, fraction: float = 2e-3) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        if coefficient < 0:
            raise ValueError(f"coefficient must be >= 0, got {coefficient}")
        self._coefficient = coefficient
        self._fraction = fraction
        self._covariance = Covariance()
        self._threshold = torch.inf

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "N 2"]:
        return Covariance.survey(rows, outputs)

    def begin(self, table: Float[Tensor, "N 2"]) -> dict[str, float]:
        self._covariance, self._threshold = Covariance.of(table), torch.inf
        if len(table):
            num_chosen = max(1, int(self._fraction * len(table)))
            values = self._covariance(table)
            values = values[values > 0]  # without contrast there is none to choose
            if len(values):
                self._threshold = values.topk(min(num_chosen, len(values))).values[-1].item()
        return {}

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        covariance = self._covariance(Covariance.survey(rows, outputs))
        gap = (outputs.logprobs - proximal_logprobs(rows, outputs)).abs()
        chosen = torch.where(covariance >= self._threshold, gap, 0.0)
        return LossTerm(self._coefficient * chosen.sum())


@dataclass(eq=False)
class EntropyShapedGradient(PolicyGradient):
    """The clipped policy gradient of A + min(scale * H, |A| / kappa), the entropy without gradient
    (arXiv 2506.14758); no advantage changes its sign for kappa > 1.

    A = 1 and H = 2 give 1.5; A = -1 and H = .5 give -.8.
    """

    scale: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale < 0 or self.kappa < 1:
            raise ValueError(
                f"must have scale >= 0 and kappa >= 1, got scale={self.scale}, kappa={self.kappa}"
            )

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        bonus = self.scale * outputs.entropy.detach().to(rows.advantages.dtype)
        bonus = torch.minimum(bonus, rows.advantages.abs() / self.kappa)
        return super().loss(replace(rows, advantages=rows.advantages + bonus), outputs)
