"""Policy-gradient surrogates: what one token of known advantage adds to the loss.

Invariant: advantages and importance weights carry no gradient; a token filter and a rollout
correction multiply the numerator only. All are objectives (`learners.objectives`); their ratio is
taken against the rollout policy or, decoupled from it, against the proximal one or one between.
"""

# ruff: noqa: F722 (shapes in annotations)

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learners.aggregation import Aggregation, Denominator, Name
from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs
from learners.objectives import LossTerm
from learners.off_policy import RatioTo, RolloutCorrection, base_logprobs, log_ratio
from learners.segments import sequence_means
from learners.step_sums import Mean
from learners.token_filters import TokenFilter, build_filter

_MAX_SEQUENCE_LOG = 10.0
Losses = tuple[Float[Tensor, " N"], Float[Tensor, " N"]]  # token losses; 1.0 where clipped


@dataclass(eq=False)
class Surrogate(ABC):
    """What all surrogates share; a subclass adds its own settings and gives the loss of each token.

    `ratio_to="proximal"` is decoupled PPO (arXiv 2505.24298): the trust region lies around the
    learner at the start of the step, and `correction` (settings of `RolloutCorrection`) weights
    tokens by proximal / rollout. `interpolated` guesses the proximal log-probs (A-3PO) instead of
    computing them. `token_filter` is a plug-in `{use, settings}` that chooses the tokens with a
    gradient. `needs_proximal` follows from these: a subclass that reads the proximal policy by
    itself sets it after `__post_init__`.
    """

    ratio_to: RatioTo = field(default="rollout", kw_only=True)
    correction: dict[str, Any] | None = field(default=None, kw_only=True)
    token_filter: dict[str, Any] | None = field(default=None, kw_only=True)
    aggregation: Name = field(default="token_mean", kw_only=True)
    constant: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.ratio_to not in get_args(RatioTo):
            raise ValueError(
                f"ratio_to must be one of {', '.join(get_args(RatioTo))}, got {self.ratio_to!r}"
            )
        if self.correction is not None and self.ratio_to == "rollout":
            raise ValueError(
                "correction weights by proximal / rollout and needs ratio_to=proximal or "
                "interpolated; the ratio to the rollout policy corrects for it already"
            )
        self._correction = None if self.correction is None else RolloutCorrection(**self.correction)
        self._filter: TokenFilter | None = build_filter(self.token_filter)
        self._aggregation = Aggregation(self.aggregation, self.constant)
        self.denominator: Denominator = self._aggregation.denominator
        self.needs_survey = self._filter is not None
        self.needs_proximal = self.ratio_to == "proximal" or (
            self._filter is not None and getattr(self._filter, "needs_proximal", True)
        )

    def loss(self, rows: MicroBatch, outputs: TokenOutputs) -> LossTerm:
        ratio_log = log_ratio(rows, outputs, self.ratio_to)
        losses, is_clipped = self._token_losses(ratio_log, rows, outputs)
        metrics = {
            "ratio/importance_mean": Mean(ratio_log.detach().exp().sum(), rows.num_loss_tokens),
            "ratio/clip_fraction": Mean(is_clipped.sum(), rows.num_loss_tokens),
        }
        if self._correction is not None:
            is_corrected = self._is_corrected(rows)
            base = base_logprobs(rows, outputs, self.ratio_to)
            weights, corrected = self._correction.weights(rows, base, is_corrected)
            losses = torch.where(is_corrected, losses * weights, losses)
            metrics |= corrected
        if self._filter is not None:
            is_kept = self._filter.keeps(rows, outputs, is_clipped)
            losses = torch.where(is_kept, losses, 0.0)
            metrics["ratio/kept_fraction"] = Mean(is_kept.sum(), rows.num_loss_tokens)
        return LossTerm(self._aggregation.sum(losses, rows), metrics)

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Tensor | None:
        return None if self._filter is None else self._filter.survey(rows, outputs)

    def begin(self, table: Tensor) -> dict[str, float]:
        assert self._filter is not None
        return self._filter.begin(table)

    def _is_corrected(self, rows: MicroBatch) -> Bool[Tensor, " N"]:
        """Tokens that `correction` weights."""
        return torch.ones_like(rows.is_guided)

    @abstractmethod
    def _token_losses(self, ratio_log: Tensor, rows: MicroBatch, outputs: TokenOutputs) -> Losses:
        """Loss [N] of each token from its log-ratio [N], and which tokens were clipped [N]."""


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not 0 <= clip_low < 1 or clip_high < 0:
        raise ValueError(
            f"clip_low must be in [0, 1) and clip_high >= 0, got {clip_low}, {clip_high}"
        )


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-r A without and with clipping of r to [1 - low, 1 + high]."""
    plain = -ratio * advantages
    return plain, torch.maximum(plain, -ratio.clamp(1 - low, 1 + high) * advantages)


@dataclass(eq=False)
class PolicyGradient(Surrogate):
    """Clipped policy gradient: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    PPO clipping (arXiv 1707.06347) with the wider upper bound of DAPO (arXiv 2503.14476). By
    default r is taken against the rollout policy, so it corrects policy age and engine mismatch at
    once. `dual_clip` c > 1 bounds the loss of negative advantages at c |A| (arXiv 1912.09729).
    With r = 1.35, A = 1 the loss is -1.28 and its gradient 0.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")

    def _token_losses(self, ratio_log: Tensor, rows: MicroBatch, outputs: TokenOutputs) -> Losses:
        ratio = ratio_log.exp()
        plain, losses = _clipped(ratio, rows.advantages, self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            bound = -self.dual_clip * rows.advantages
            losses = torch.where(rows.advantages < 0, torch.minimum(losses, bound), losses)
        return losses, losses.detach() != plain.detach()


@dataclass(eq=False)
class SequencePolicyGradient(Surrogate):
    """GSPO (arXiv 2507.18071): one ratio per sequence, s = exp(mean log r), clipped for all its
    tokens at once.

    Written per token, s_t = sg(s) r_t / sg(r_t), which has the gradient of the sequence form and
    lets advantages differ by token. The clip is so narrow that engine mismatch and policy age
    alone would leave it, always on the same side, so s is taken against the proximal policy, and
    `correction` is there for these. Log-ratios [.02, -.01, .005] give s = 1.0050125.
    """

    ratio_to: RatioTo = field(default="proximal", kw_only=True)
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    aggregation: Name = field(default="seq_mean_token_mean", init=False)
    constant: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.clip_low, self.clip_high)

    def _token_losses(self, ratio_log: Tensor, rows: MicroBatch, outputs: TokenOutputs) -> Losses:
        mean = sequence_means(ratio_log.detach(), rows)[rows.sequence_ids]
        ratio = (mean + ratio_log - ratio_log.detach()).clamp(max=_MAX_SEQUENCE_LOG).exp()
        plain, losses = _clipped(ratio, rows.advantages, self.clip_low, self.clip_high)
        return losses, losses.detach() != plain.detach()


@dataclass(eq=False)
class ClippedImportance(Surrogate):
    """CISPO (arXiv 2506.13585): -sg(clip(r, floor, cap)) A log p; no token loses its gradient.

    `cap` and `floor` are absolute ratios, not widths. Ratios [.5, 1, 6] with cap 5 and log-probs
    -1, -2, -3 give a mean loss of 5.8333.
    """

    cap: float = 5.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1 <= self.cap:
            raise ValueError(
                f"must have 0 <= floor <= 1 <= cap, got floor={self.floor}, cap={self.cap}"
            )

    def _token_losses(self, ratio_log: Tensor, rows: MicroBatch, outputs: TokenOutputs) -> Losses:
        ratio = ratio_log.detach().exp()
        weights = ratio.clamp(self.floor, self.cap)
        return -weights * rows.advantages * outputs.logprobs, weights != ratio


@dataclass(eq=False)
class GeometricMean(Surrogate):
    """GMPO (arXiv 2507.20673): -A exp(mean of log r, each clipped on the side that A rewards).

    `clip_low` and `clip_high` are widths in log space. The mean is over the sequence, so all its
    tokens must have one advantage (outcome credit). Log-ratios [.5, -.1] give -1.161834 at A = 1
    and 1.221403 at A = -1.
    """

    needs_outcome_credit: ClassVar[bool] = True
    clip_low: float = 0.4
    clip_high: float = 0.4
    aggregation: Name = field(default="seq_mean_token_mean", init=False)
    constant: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.clip_low, self.clip_high) < 0:
            raise ValueError(
                f"clip_low and clip_high must be >= 0, got {self.clip_low}, {self.clip_high}"
            )

    def _token_losses(self, ratio_log: Tensor, rows: MicroBatch, outputs: TokenOutputs) -> Losses:
        is_positive = rows.advantages >= 0
        clipped = torch.where(
            is_positive, ratio_log.clamp(max=self.clip_high), ratio_log.clamp(min=-self.clip_low)
        )
        mean = sequence_means(clipped, rows)[rows.sequence_ids]
        return -rows.advantages * mean.exp(), clipped.detach() != ratio_log.detach()


@dataclass(eq=False)
class SoftAdaptive(Surrogate):
    """SAPO (arXiv 2511.20347): -(4 / tau) sigmoid(tau (r - 1)) A, a smooth gate instead of a clip.

    tau is `tau_positive` where A > 0, else `tau_negative`. At r = 1 the gradient is that of r A,
    and it fades on both sides. r = 1.3 gives gates of 2.297770 at A > 0 and 2.202306 at A < 0.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    aggregation: Name = field(default="seq_mean_token_mean", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tau_positive, self.tau_negative) <= 0:
            raise ValueError(
                "tau_positive and tau_negative must be positive, "
                f"got {self.tau_positive}, {self.tau_negative}"
            )

    def _token_losses(self, ratio_log: Tensor, rows: MicroBatch, outputs: TokenOutputs) -> Losses:
        ratio = ratio_log.exp()
        tau = torch.full_like(ratio, self.tau_negative)
        tau = tau.masked_fill(rows.advantages > 0, self.tau_positive)
        gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))
        return -gate * rows.advantages, torch.zeros_like(rows.is_guided)
