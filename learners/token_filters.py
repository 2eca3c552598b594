"""Token filters: which tokens of a surrogate have a gradient.

Invariant: a filter reads entropies and log-probs without gradient, and what it drops stays in the
denominator; its global statistics come from the survey of the whole update, so ranks and
micro-batches do not change the choice. Settings of the surrogates (`token_filter`).
"""

# ruff: noqa: F722 (shapes in annotations)

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cluster.plugins import build
from learners.batch import MicroBatch
from learners.covariance import Covariance
from learners.logprobs import TokenOutputs
from learners.off_policy import proximal_logprobs
from learners.segments import quantile

FILTERS = {
    "forking_tokens": "learners.token_filters:ForkingTokens",
    "clip_cov": "learners.token_filters:ClipCovariance",
    "second_moment": "learners.token_filters:SecondMoment",
}


class TokenFilter(Protocol):
    """`needs_proximal` is True unless it says False, as of an objective."""

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "M C"]:
        """As `learners.objectives.Surveying.survey`."""
        ...

    def begin(self, table: Float[Tensor, "M C"]) -> dict[str, float]: ...

    def keeps(
        self, rows: MicroBatch, outputs: TokenOutputs, is_clipped: Bool[Tensor, " N"]
    ) -> Bool[Tensor, " N"]: ...


def build_filter(plugin: Mapping[str, Any] | None) -> TokenFilter | None:
    """From `{use: ..., settings: {...}}`; raises `ConfigError` naming `token_filter`."""
    if plugin is None:
        return None
    unknown = plugin.keys() - {"use", "settings"}
    if unknown or "use" not in plugin:
        raise ValueError(f"token_filter must have use and settings, got {sorted(plugin)}")
    return build(plugin["use"], plugin.get("settings", {}), FILTERS, "token_filter")


class ForkingTokens:
    """Only the `fraction` of tokens with the highest entropy learn (80/20, arXiv 2506.01939).

    The threshold is the quantile of the full entropy over the whole update. Entropies .1 to 1.0 in
    steps of .1 have the threshold .82 and keep two.
    """

    needs_proximal = False

    def __init__(self, fraction: float = 0.2) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"token_filter: fraction must be in (0, 1], got {fraction}")
        self._fraction = fraction
        self._threshold = 0.0

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "N 1"]:
        return outputs.entropy.detach().double()[:, None]

    def begin(self, table: Float[Tensor, "N 1"]) -> dict[str, float]:
        if len(table) == 0:
            return {}
        self._threshold = quantile(table[:, 0], 1 - self._fraction)
        return {"policy/forking_threshold": self._threshold}

    def keeps(
        self, rows: MicroBatch, outputs: TokenOutputs, is_clipped: Bool[Tensor, " N"]
    ) -> Bool[Tensor, " N"]:
        return outputs.entropy.detach().double() >= self._threshold


class ClipCovariance:
    """Clip-Cov (arXiv 2505.22617): a random `fraction` of all tokens, drawn from those whose
    covariance lies between `low` and `high`, has no gradient.

    The draw is a hash of the token and its rollout log-prob: the same on any number of ranks and
    after a restart, another one for every rollout. A drawn token that PPO clipped anyway is left
    alone.
    """

    needs_proximal = False

    def __init__(self, fraction: float = 2e-4, low: float = 1.0, high: float = 5.0) -> None:
        if not 0 < fraction <= 1 or not low < high:
            raise ValueError(
                "token_filter: must have 0 < fraction <= 1 and low < high, "
                f"got fraction={fraction}, low={low}, high={high}"
            )
        self._fraction = fraction
        self._low, self._high = low, high
        self._covariance = Covariance()
        self._last_draw = -1.0

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "N 3"]:
        return torch.cat([Covariance.survey(rows, outputs), self._draws(rows)[:, None]], -1)

    def begin(self, table: Float[Tensor, "N 3"]) -> dict[str, float]:
        self._covariance = Covariance.of(table)
        draws = table[self._is_eligible(table), 2]
        num_dropped = min(len(draws), max(1, int(self._fraction * len(table))))
        self._last_draw = draws.sort().values[num_dropped - 1].item() if num_dropped else -1.0
        return {}

    def keeps(
        self, rows: MicroBatch, outputs: TokenOutputs, is_clipped: Bool[Tensor, " N"]
    ) -> Bool[Tensor, " N"]:
        is_drawn = self._draws(rows) <= self._last_draw
        is_eligible = self._is_eligible(Covariance.survey(rows, outputs))
        return ~(is_eligible & is_drawn & ~is_clipped)

    def _is_eligible(self, table: Tensor) -> Tensor:
        covariance = self._covariance(table)
        return (covariance > self._low) & (covariance < self._high)

    @staticmethod
    def _draws(rows: MicroBatch) -> Float[Tensor, " N"]:
        """A number in [0, 1) per token: a multiplicative hash of it, its place and its sequence, so
        that siblings which begin alike are drawn apart.
        """
        bits = rows.rollout_logprobs.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        counts = rows.sequence_loss_tokens
        place = torch.arange(len(bits), device=bits.device)
        place = place - (counts.cumsum(0) - counts)[rows.sequence_ids]
        token = (bits * 2654435761 + rows.labels * 40503 + place * 2246822519) & 0xFFFFFFFF
        whole = torch.zeros_like(counts).index_add(0, rows.sequence_ids, token)
        mixed = (token + whole[rows.sequence_ids] * 3266489917) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 13)) * 3266489917) & 0xFFFFFFFF
        return (mixed ^ (mixed >> 16)).double() / 2**32


class SecondMoment:
    """M2PO (arXiv 2510.01161): leaves out the tokens with the largest |log w|, w = proximal /
    rollout, until the mean of (log w)^2 over the whole update is at most `bound`.

    Log-weights .1, -.2, 1.5, -.05 have the mean .5756; without the third it is .0175.
    """

    def __init__(self, bound: float = 0.04) -> None:
        if bound <= 0:
            raise ValueError(f"token_filter: bound must be positive, got {bound}")
        self._bound = bound
        self._largest = torch.inf

    def survey(self, rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "N 1"]:
        log_weights = proximal_logprobs(rows, outputs) - rows.rollout_logprobs
        return log_weights.detach().double().square()[:, None]

    def begin(self, table: Float[Tensor, "N 1"]) -> dict[str, float]:
        squares = table[:, 0].sort().values
        counts = torch.arange(1, len(squares) + 1, dtype=squares.dtype)
        num_kept = int((squares.cumsum(0) / counts <= self._bound).sum())
        self._largest = squares[num_kept - 1].item() if num_kept else -1.0
        kept = squares[:num_kept].mean().item() if num_kept else 0.0
        return {"ratio/second_moment": kept} if len(squares) else {}

    def keeps(
        self, rows: MicroBatch, outputs: TokenOutputs, is_clipped: Bool[Tensor, " N"]
    ) -> Bool[Tensor, " N"]:
        return self.survey(rows, outputs)[:, 0] <= self._largest
