"""The critic: a value network beside the policy, with an optimizer of its own.

Invariant: values that credit is made of are those from before the step; the critic learns in the
same updates as the policy, and then `critic.epochs` - 1 times more, on the same micro-batches of
every rank, so both run the same collectives everywhere. It exists when the configured credit is
`ValueBased`. Owned by the learner.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from cluster.config import Config, CriticSection
from learners.batch import MicroBatch
from learners.checkpoint import Part
from learners.model import PolicyModel, ValueModel, shard
from learners.optimizer import ShardedAdamW, clip_factor
from learners.segments import sequence_sums
from learners.step_sums import StepSums
from learners.value_loss import ValueObjective, build_value_loss

CLIPPED = "value/clip_fraction"
_MIN_VARIANCE = 1e-12


@dataclass
class Critic:
    """`module` is sharded like the policy."""

    module: ValueModel
    section: CriticSection
    loss: ValueObjective
    device: torch.device
    weight_decay: float
    max_grad_norm: float

    def __post_init__(self) -> None:
        self._optimizer = ShardedAdamW(self.module, self.weight_decay)
        self._sums = StepSums(self.device)  # of an update
        self._step_sums = StepSums(self.device)  # of all updates of a step
        self._again: list[MicroBatch] = []  # those of the update, for further epochs

    @property
    def part(self) -> Part:
        """What belongs into a checkpoint."""
        return Part(self.module, self._optimizer.inner)

    @torch.no_grad()
    def copy_from(self, policy: PolicyModel) -> None:
        """Take over the decoder that `policy` has now, shard by shard."""
        theirs = policy.decoder.parameters()
        for our, their in zip(self.module.decoder.parameters(), theirs, strict=True):
            our.copy_(their)

    @torch.no_grad()
    def annotate(self, rows: MicroBatch) -> MicroBatch:
        """`rows` with `values`; one forward pass, collective."""
        values = self.module(rows)
        cast(FSDPModule, self.module).reshard()
        return replace(rows, values=values)

    def accumulate(self, rows: MicroBatch) -> None:
        """Add the gradient of one micro-batch, and what its values explained."""
        assert rows.values is not None
        assert rows.returns is not None
        self._add_gradient(rows)
        is_plain = ~rows.is_guided
        returns = torch.where(is_plain, rows.returns.double(), 0.0)
        errors = torch.where(is_plain, rows.returns.double() - rows.values.double(), 0.0)
        self._step_sums.add(
            {
                "tokens": is_plain.sum(),
                "returns": returns.sum(),
                "return_squares": returns.square().sum(),
                "errors": errors.sum(),
                "error_squares": errors.square().sum(),
            }
        )
        if self.section.epochs > 1:
            self._again.append(rows)

    def apply(self, is_step: bool) -> dict[str, float]:
        """`critic.epochs` optimizer steps, each if its gradient is finite, and none unless
        `is_step`, which is False where the gradient of the policy was unsound. The metrics are of
        the first one, but for the clipped share, a mean; the same on every rank.
        """
        steps = [self._take_step(is_step)]
        for _ in range(self.section.epochs - 1 if is_step else 0):
            for rows in self._again:
                self._add_gradient(rows)
            steps.append(self._take_step(is_step))
        self._again = []
        clipped = [step[CLIPPED] for step in steps if CLIPPED in step]
        return steps[0] | ({CLIPPED: fmean(clipped)} if clipped else {})

    def _add_gradient(self, rows: MicroBatch) -> None:
        term = self.loss.loss(rows, self.module(rows))
        term.total.backward()
        is_plain = ~rows.is_guided
        self._sums.add(
            {
                "loss": term.total.detach(),
                "tokens": is_plain.sum(),
                "sequences": (sequence_sums(is_plain.double(), rows) > 0).sum(),
            }
        )
        self._sums.add_means(term.metrics)

    def _take_step(self, is_step: bool) -> dict[str, float]:
        self._sums.add({"grad_square": self._optimizer.grad_square()})
        totals, means = self._sums.reduce()
        divisor = max(1.0, totals[self.loss.denominator])
        scale = dist.get_world_size() / divisor  # FSDP2 has averaged the ranks' sums
        grad_norm = math.sqrt(totals["grad_square"]) * scale
        if is_step and math.isfinite(grad_norm):
            factor = scale * clip_factor(grad_norm, self.max_grad_norm)
            self._optimizer.step(self.section.lr, factor)
        else:
            self._optimizer.skip()
        return {"value/loss": totals["loss"] / divisor, "value/grad_norm": grad_norm} | means

    def step_metrics(self) -> dict[str, float]:
        """Of the returns of all updates since the last call, the same on every rank; collective.

        `value/explained_variance` is 1 - Var(return - value) / Var(return) of the values that
        credit was made of, which are from before the step; it is absent when all returns are equal.
        """
        totals = self._step_sums.reduce().sums
        count = max(1.0, totals["tokens"])
        metrics = {"value/return_mean": totals["returns"] / count}
        variance, unexplained = (
            totals[f"{name}_squares"] / count - (totals[f"{name}s"] / count) ** 2
            for name in ("return", "error")
        )
        if variance > _MIN_VARIANCE:
            metrics["value/explained_variance"] = 1 - unexplained / variance
        return metrics

    def drop(self) -> None:
        """Forget the gradients and sums that had no step yet."""
        self._optimizer.skip()
        self._sums, self._step_sums = StepSums(self.device), StepSums(self.device)
        self._again = []


def open_critic(
    config: Config, load: Callable[[], PolicyModel], mesh: DeviceMesh, device: torch.device
) -> Critic | None:
    """The configured critic, on the decoder of a policy that `load` opens unsharded."""
    section, learner = config.critic, config.learner
    if section is None:
        return None
    module = ValueModel(load())
    shard(module, mesh, getattr(torch, config.policy.dtype), "critic" in learner.save_memory)
    loss = build_value_loss(section)
    return Critic(module, section, loss, device, learner.weight_decay, learner.max_grad_norm)
