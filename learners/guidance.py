"""Learning from hinted rollouts without the hint (Guide, arXiv 2506.13923).

Invariant: a guided row is conditioned on its plain context, while its `rollout_logprobs` are those
of the hinted one; so their ratio r holds the shift of context, and hint tokens have no gradient
because they are in no context that the learner sees. Advantages come from the guided group alone.

With g the hint, mu the engine that sampled and prox the learner at the start of the step, r is

    pi(y|x) / mu(y|x,g) = pi(y|x) / prox(y|x) . prox(y|x) / prox(y|x,g) . prox(y|x,g) / mu(y|x,g)
                          policy step           context shift             engine and policy age

Given tokens, which no policy sampled (`Trajectory.num_given`), are guided ones of a mu and a prox
that were certain of them: r = pi, and f(r) = r / (r + .1) is LUFFY's (arXiv 2504.14945).
"""

# ruff: noqa: F722 (shapes in annotations)

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from learners.aggregation import Name
from learners.batch import MicroBatch, Row
from learners.logprobs import TokenOutputs
from learners.model import PolicyModel
from learners.objectives import LossTerm
from learners.off_policy import MAX_LOG, RatioTo, log_ratio, proximal_logprobs
from learners.segments import quantile
from learners.step_sums import Mean
from learners.surrogates import Losses, PolicyGradient

Shaping = Literal["ratio", "truncate"]
Factors = Literal["joint", "apart"]
_MIN_GAMMA = 1e-4


@torch.no_grad()
def annotate(policy: PolicyModel, rows: Sequence[Row], pack: MicroBatch) -> MicroBatch:
    """`pack` of `rows` with `sampled_logprobs`, 0 on plain rows and where given; one pass over
    guided rows.

    Collective: every rank makes the pass, also without a guided row.
    """
    hinted = [
        replace(row, context=row.sampled_context) for row in rows if row.sampled_context is not None
    ]
    seen = MicroBatch.pack(hinted, pack.token_ids.device)
    known = policy(seen).logprobs
    if isinstance(policy, FSDPModule):
        policy.reshard()
    zeros = known.new_zeros(pack.num_loss_tokens)
    is_sampled = pack.is_guided & ~pack.is_given
    return replace(pack, sampled_logprobs=zeros.masked_scatter(is_sampled, known[~seen.is_given]))


class GuidedPolicyGradient(PolicyGradient):
    """PPO clipping on plain rows; on guided ones a shaped ratio instead of the clip, or beside it.

    `factors="joint"` is the source: -f(r) A with gradient and without clipping. `shaping="ratio"`
    takes f(r) = r / (r + gamma): a guided token counts at most a quarter of a plain one;
    `"truncate"` takes min(r, cap) with the gradient of importance sampling. `factors="apart"`
    clips the policy step as PPO does, and weights it, without gradient, by f(context shift) and by
    min(engine and age, `engine_cap`). gamma is the `gamma_quantile` of what f is applied to, over
    the guided tokens of the whole update, or `gamma`. `ratio_to` and `correction` are those of
    plain rows. r = [.6065, .1003, 1.1052], A = 1: gamma 1.005443, mean loss -.330189. The mean log
    of each factor over the guided tokens is logged as `guide/log_*`.
    """

    needs_sampled_context = True
    takes_guided = True

    def __init__(
        self,
        shaping: Shaping = "ratio",
        factors: Factors = "joint",
        gamma_quantile: float = 0.9,
        gamma: float | None = None,
        cap: float = 1.0,
        engine_cap: float = 2.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        ratio_to: RatioTo = "rollout",
        correction: dict[str, Any] | None = None,
        aggregation: Name = "seq_mean_token_mean",
        constant: int | None = None,
    ) -> None:
        super().__init__(
            clip_low,
            clip_high,
            ratio_to=ratio_to,
            correction=correction,
            aggregation=aggregation,
            constant=constant,
        )
        if shaping not in get_args(Shaping):
            raise ValueError(f"shaping must be ratio or truncate, got {shaping!r}")
        if factors not in get_args(Factors):
            raise ValueError(f"factors must be joint or apart, got {factors!r}")
        if not 0 <= gamma_quantile <= 1:
            raise ValueError(f"gamma_quantile must be in [0, 1], got {gamma_quantile}")
        if min(cap, engine_cap, 1.0 if gamma is None else gamma) <= 0:
            raise ValueError(
                f"gamma, cap and engine_cap must be positive, got {gamma}, {cap}, {engine_cap}"
            )
        self._shaping: Shaping = shaping
        self._is_joint = factors == "joint"
        self._quantile = gamma_quantile
        self._cap, self._engine_cap = cap, engine_cap
        self._gamma = 1.0 if gamma is None else gamma
        self.needs_proximal = True
        self.needs_survey = shaping == "ratio" and gamma is None

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "M 1"] | None:
        """Log of what f is applied to, of each guided token; None where gamma is no quantile."""
        if not self.needs_survey:
            return None
        _, shift, _ = _log_factors(rows, outputs)
        logs = log_ratio(rows, outputs, "rollout").detach() if self._is_joint else shift
        return logs[rows.is_guided].double()[:, None]

    def begin(self, table: Float[Tensor, "M 1"]) -> dict[str, float]:
        if len(table) == 0:
            return {}
        self._gamma = max(_MIN_GAMMA, quantile(table[:, 0].exp(), self._quantile))
        return {"guide/gamma": self._gamma}

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        term = super().loss(rows, outputs)
        names = ("policy_step", "context_shift", "engine_age")
        num_guided = rows.is_guided.sum()
        logs = {
            f"guide/log_{name}": Mean(
                torch.where(rows.is_guided, log.detach(), 0.0).sum(), num_guided
            )
            for name, log in zip(names, _log_factors(rows, outputs), strict=True)
        }
        return replace(term, metrics=term.metrics | logs)

    def _is_corrected(self, rows: MicroBatch) -> Bool[Tensor, " N"]:
        return ~rows.is_guided

    def _token_losses(self, ratio_log: Tensor, rows: MicroBatch, outputs: TokenOutputs) -> Losses:
        plain, is_clipped = super()._token_losses(ratio_log, rows, outputs)
        if self._is_joint:
            guided = -self._shaped(log_ratio(rows, outputs, "rollout")) * rows.advantages
            return torch.where(rows.is_guided, guided, plain), is_clipped & ~rows.is_guided
        step, shift, engine = _log_factors(rows, outputs)
        weight = self._shaped(shift) * engine.exp().clamp(max=self._engine_cap)
        guided, is_guided_clipped = super()._token_losses(step, rows, outputs)
        return (
            torch.where(rows.is_guided, weight * guided, plain),
            torch.where(rows.is_guided, is_guided_clipped, is_clipped),
        )

    def _shaped(self, logs: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        ratio = logs.exp()
        if self._shaping == "ratio":
            return ratio / (ratio + self._gamma)
        return ratio * (self._cap / ratio.detach()).clamp(max=1)


def _log_factors(rows: MicroBatch, outputs: TokenOutputs) -> tuple[Tensor, Tensor, Tensor]:
    """Logs [N] of policy step (with gradient), context shift and engine and age, each within
    +-20; what they are on plain rows means nothing.
    """
    assert rows.sampled_logprobs is not None, "annotate() comes first"
    proximal = proximal_logprobs(rows, outputs).detach()
    factors = (
        outputs.logprobs - proximal,
        proximal - rows.sampled_logprobs,
        rows.sampled_logprobs - rows.rollout_logprobs,
    )
    step, shift, engine = (factor.clamp(-MAX_LOG, MAX_LOG) for factor in factors)
    return step, shift, engine
