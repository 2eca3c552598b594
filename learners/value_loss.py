"""Losses of the critic: what its values on the tokens that the policy wrote should have been.

Invariant: as for the policy's objectives, a loss is an unnormalised sum and names the global count
that divides it, but hinted rows are in neither: their return is not that of the context the critic
sees. Values and returns from before the step carry no gradient. Called by the critic.
"""

# ruff: noqa: F722 (shapes in annotations)

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from cluster.config import CriticSection
from cluster.plugins import build
from learners.aggregation import Aggregation, Denominator, Name
from learners.batch import MicroBatch
from learners.objectives import LossTerm
from learners.step_sums import Mean

LOSSES = {"value": "learners.value_loss:ClippedValue"}


class ValueObjective(Protocol):
    """As `learners.objectives.Objective`, on values [N] instead of the policy's outputs."""

    denominator: Denominator

    def loss(self, rows: MicroBatch, values: Float[Tensor, " N"]) -> LossTerm: ...


class ClippedValue:
    """.5 max((v - R)^2, (v_old + clip(v - v_old, +-clip) - R)^2) per loss token (PPO, arXiv
    1707.06347), v_old from before the step; `clip` None is the plain squared error.

    v .9, v_old .1, clip .5, R .2: .245.
    """

    def __init__(
        self,
        clip: float | None = 0.5,
        aggregation: Name = "token_mean",
        constant: int | None = None,
    ) -> None:
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, got {clip}")
        self._clip = clip
        self._aggregation = Aggregation(aggregation, constant)
        self.denominator: Denominator = self._aggregation.denominator

    def loss(self, rows: MicroBatch, values: Float[Tensor, " N"]) -> LossTerm:
        assert rows.values is not None
        assert rows.returns is not None
        errors = (values - rows.returns).square()
        is_clipped = torch.zeros_like(rows.is_guided)
        if self._clip is not None:
            change = values - rows.values
            near = rows.values + change.clamp(-self._clip, self._clip)
            clipped = (near - rows.returns).square()
            is_clipped = (change.abs() > self._clip) & (clipped > errors)
            errors = torch.where(is_clipped, clipped, errors)
        losses = torch.where(rows.is_guided, 0.0, errors / 2)
        clipped = Mean((is_clipped & ~rows.is_guided).sum(), (~rows.is_guided).sum())
        return LossTerm(self._aggregation.sum(losses, rows), {"value/clip_fraction": clipped})


def build_value_loss(section: CriticSection) -> ValueObjective:
    """The configured loss; raises `ConfigError` naming `critic.loss`."""
    return build(section.loss.use, section.loss.settings, LOSSES, "critic.loss")
