"""KL penalty to the reference policy, the frozen policy that RL started from.

Invariant: sampled from the policy, x = log learner / reference; an estimator's value and the
expectation of its gradient are two things, so each name says which it gets right. An objective.
"""

from typing import Literal, get_args

import torch

from learners.aggregation import Aggregation, Denominator, Name
from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.objectives import LossTerm
from learners.off_policy import MAX_LOG
from learners.segments import reverse_sums
from learners.step_sums import Mean

Estimator = Literal["k1", "k2", "k3", "k3_plus", "k1_reward"]
_MAX_K3 = 10.0


class KLPenalty:
    """coefficient * mean of an estimate of KL(learner || reference), per loss token.

    k1 = x (unbiased value; its expected gradient is zero, so refused); k2 = x^2 / 2 (gradient of
    the reverse KL); k3 = exp(-x) - 1 + x (unbiased value, gradient of the forward KL); k3_plus has
    the value of k3 and the gradient of k2; k1_reward lets the sum of x from a token on weigh the
    token's log-prob, which is the penalty in the reward: exact for whole sequences.
    `off_policy=True` multiplies by the detached ratio to the rollout policy. Guided tokens were
    sampled from another context, so they say nothing of this KL: they add 0. x = .2: k2 .02, k3
    .018731.
    """

    needs_reference = True
    needs_proximal = False
    takes_guided = True

    def __init__(
        self,
        estimator: Estimator = "k3_plus",
        coefficient: float = 0.001,
        off_policy: bool = False,
        aggregation: Name = "token_mean",
        constant: int | None = None,
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(
                f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}"
            )
        if estimator == "k1":
            raise ValueError(
                "estimator=k1 in the loss has zero expected gradient: use k1_reward, k2 or k3_plus"
            )
        if coefficient < 0:
            raise ValueError(f"coefficient must be >= 0, got {coefficient}")
        self._estimator = estimator
        self._coefficient = coefficient
        self._off_policy = off_policy
        self._aggregation = Aggregation(aggregation, constant)
        self.denominator: Denominator = self._aggregation.denominator

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        assert rows.ref_logprobs is not None
        gap = (outputs.logprobs - rows.ref_logprobs).clamp(-MAX_LOG, MAX_LOG)
        k3 = ((-gap).exp() - 1 + gap).clamp(max=_MAX_K3)
        if self._estimator == "k2":
            losses = gap.square() / 2
        elif self._estimator == "k3":
            losses = k3
        elif self._estimator == "k3_plus":
            k2 = gap.square() / 2
            losses = k3.detach() + k2 - k2.detach()
        else:
            losses = reverse_sums(gap.detach(), rows) * outputs.logprobs
        if self._off_policy:
            shift = (outputs.logprobs - rows.rollout_logprobs).detach()
            losses = losses * shift.clamp(-MAX_LOG, MAX_LOG).exp()
        losses, k3 = (torch.where(rows.is_guided, 0.0, values) for values in (losses, k3))
        return LossTerm(
            self._coefficient * self._aggregation.sum(losses, rows),
            metrics={"policy/reference_kl": Mean(k3.detach().sum(), (~rows.is_guided).sum())},
        )
