"""One optimizer update of the policy, and of its critic: survey, gradients, normalisation, step.

Invariant: the gradient of an update is that of the loss over all its rows, divided by global
counts, however the rows are split over micro-batches and ranks. Where one count divides all losses
and none needs a survey, gradients may accumulate before the counts are known; otherwise `survey`
comes first. In a frozen update only the critic learns: the policy has no gradient, and its losses
know nothing of the update but, once, an anchor. All methods are collective. Owned by the learner.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from learners.aggregation import Denominator
from learners.batch import MicroBatch
from learners.critic import Critic
from learners.mismatch import WEIGHT, WEIGHT_SQUARE
from learners.model import PolicyModel
from learners.objectives import WeightedLosses
from learners.optimizer import ShardedAdamW, clip_factor
from learners.step_sums import LARGEST, StepSums

Counts = dict[Denominator, float]


@dataclass(frozen=True)
class UpdateResult:
    """`is_step` False: nothing was learned. `num_tokens` counts contexts, too."""

    is_step: bool
    num_tokens: float
    metrics: dict[str, float]


class PolicyUpdate:
    """Accumulates one update after another on the same policy and optimizer."""

    def __init__(
        self,
        policy: PolicyModel,
        optimizer: ShardedAdamW,
        losses: WeightedLosses,
        device: torch.device,
        max_grad_norm: float,
        critic: Critic | None = None,
    ) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._losses = losses
        self._device = device
        self._max_grad_norm = max_grad_norm
        self._critic = critic
        self._sums = StepSums(device)
        self._counts: Counts | None = None
        self._surveyed: dict[str, float] = {}

    def survey(self, packs: Sequence[MicroBatch]) -> None:
        """Learn the global counts of the update, and what its objectives must know beforehand."""
        sums = StepSums(torch.device("cpu"))
        sums.add({"tokens": 0, "sequences": 0})
        for pack in packs:
            sums.add({"tokens": pack.num_loss_tokens, "sequences": pack.num_sequences})
        totals = sums.reduce().sums
        self._counts = {"tokens": totals["tokens"], "sequences": totals["sequences"]}
        if self._losses.needs_survey:
            self._surveyed = self._losses.begin(self._tables(packs))

    @torch.no_grad()
    def _tables(self, packs: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """What the losses want to know of `packs` of all ranks, by name; one pass over them."""
        tables: dict[str, list[Tensor]] = {}
        for pack in packs:
            outputs = self._policy(pack, self._losses.nucleus)
            for name, table in self._losses.survey(pack, outputs).items():
                tables.setdefault(name, []).append(table)
        cast(FSDPModule, self._policy).reshard()
        return {name: gather(torch.cat(parts)) for name, parts in sorted(tables.items())}

    def anchor(self, packs: Sequence[MicroBatch]) -> None:
        """Give a loss that still needs an anchor one from `packs`, all of a step; one pass then."""
        if self._losses.needs_anchor:
            self._losses.anchor(self._tables(packs))

    @torch.no_grad()
    def with_proximal(self, packs: Sequence[MicroBatch]) -> list[MicroBatch]:
        """`packs`, all of a step, with the log-probs of the policy as it is now."""
        result = [replace(pack, proximal_logprobs=self._policy(pack).logprobs) for pack in packs]
        cast(FSDPModule, self._policy).reshard()
        return result

    def accumulate(self, rows: MicroBatch, is_frozen: bool = False) -> None:
        """Add the gradient of one micro-batch."""
        if not is_frozen:
            outputs = self._policy(rows, self._losses.nucleus)
            found = self._losses.sums(rows, outputs, self._counts)
            (found.total * self._magnitude).backward()
            self._sums.add({f"loss/{name}": value for name, value in found.losses.items()})
            self._sums.add({"ratio/mismatch_abs_max": found.largest_gap})
            self._sums.add_means(found.means)
        self._sums.add(
            {
                "num_loss_tokens": rows.num_loss_tokens,
                "num_sequences": rows.num_sequences,
                "num_tokens": rows.num_tokens,
            }
        )
        if self._critic is not None:
            self._critic.accumulate(rows)

    def apply(self, rate: float | None) -> UpdateResult:
        """Normalise by the global counts, clip, step; the same result on every rank.

        A non-finite loss or gradient skips the step, and so does an update without a loss token.
        `rate` None ends a frozen update, in which only the critic's gradient counts.
        """
        if rate is None:
            return self._apply_critic()
        self._sums.add({"grad_square": self._optimizer.grad_square()})
        totals, metrics = self._sums.reduce()
        num_loss_tokens = totals["num_loss_tokens"]
        divisor = self._divisor(totals)
        # FSDP2 has averaged the ranks' sums.
        scale = dist.get_world_size() / divisor / self._magnitude
        grad_norm = math.sqrt(totals["grad_square"]) * scale
        is_sound = math.isfinite(grad_norm) and math.isfinite(totals["loss/total"])
        is_step = is_sound and num_loss_tokens > 0
        if is_step:
            self._optimizer.step(rate, scale * clip_factor(grad_norm, self._max_grad_norm))
        else:
            self._optimizer.skip()
        metrics |= {
            name: value / divisor if name.startswith("loss/") else value
            for name, value in totals.items()
            if name.startswith("loss/") or name.endswith(LARGEST)
        }
        weight, square = (metrics.pop(name, 0.0) for name in (WEIGHT, WEIGHT_SQUARE))
        if square:
            metrics["ratio/mismatch_ess"] = weight**2 / square
            metrics["ratio/mismatch_chi2"] = square - 1.0
        metrics |= self._surveyed | {
            "grad/norm": grad_norm,
            "grad/skipped": float(not is_step),
            "learner/num_loss_tokens": num_loss_tokens,
        }
        if self._critic is not None:
            metrics |= self._critic.apply(is_step)
        self._counts, self._surveyed = None, {}
        return UpdateResult(is_step, totals["num_tokens"], metrics)

    def _apply_critic(self) -> UpdateResult:
        assert self._critic is not None
        totals = self._sums.reduce().sums
        num_loss_tokens = totals["num_loss_tokens"]
        metrics = self._critic.apply(num_loss_tokens > 0)
        is_step = num_loss_tokens > 0 and math.isfinite(metrics["value/grad_norm"])
        metrics |= {
            "grad/skipped": float(not is_step),
            "learner/num_loss_tokens": num_loss_tokens,
        }
        return UpdateResult(is_step, totals["num_tokens"], metrics)

    def step_metrics(self, results: Sequence[UpdateResult]) -> dict[str, float]:
        """Metrics of a step from those of all its updates, and what is of the whole step."""
        return _joined(results) | (self._critic.step_metrics() if self._critic else {})

    def drop(self) -> None:
        """Forget the gradients and sums that had no step yet."""
        self._optimizer.skip()
        self._sums = StepSums(self._device)
        self._counts, self._surveyed = None, {}
        if self._critic is not None:
            self._critic.drop()

    @property
    def _magnitude(self) -> float:
        """Keeps gradients of losses that are divided by their counts already near 1, as those of
        sums are, so that half precision can hold them. A power of two, which rounds nothing.
        """
        if self._counts is None:
            return 1.0
        return 2.0 ** round(math.log2(max(1.0, self._counts["tokens"])))

    def _divisor(self, totals: dict[str, float]) -> float:
        """What still divides the sums: nothing when each loss was divided by its own count."""
        if self._counts is not None:
            return 1.0
        is_by_token = self._losses.common_denominator == "tokens"
        return max(1.0, totals["num_loss_tokens" if is_by_token else "num_sequences"])


def gather(table: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, on the CPU; ranks may have different numbers of rows."""
    table = table.cpu().contiguous()
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(table)]))
    most = max(int(size) for size in sizes)
    padded = torch.cat([table, table.new_zeros(most - len(table), *table.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _joined(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Means; loss tokens add up, and the largest of what is a maximum stays."""
    names = dict.fromkeys(name for result in results for name in result.metrics)
    known = {name: [r.metrics[name] for r in results if name in r.metrics] for name in names}
    metrics = {
        name: max(values) if name.endswith(LARGEST) else sum(values) / len(values)
        for name, values in known.items()
    }
    total = "learner/num_loss_tokens"
    return metrics | {total: sum(known[total])}
