"""AdamW over the sharded parameters, and the learning rate of each step.

Invariant: gradients arrive as unnormalised sums (averaged over ranks by FSDP2) and are scaled and
clipped in one pass when the global counts are known. Called by the learner and by warm start.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_PART = 2**24
_FLOOR = 0.1  # a cosine ends at this fraction of the peak


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: Literal["constant", "cosine"],
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Rate of step `step` (from 0): linear warm-up to `peak`, then flat or cosine to 10 %."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return peak * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


class ShardedAdamW:
    """AdamW with betas (.9, .95) of what learns in `module`; every parameter element lives on
    exactly one rank.
    """

    def __init__(self, module: nn.Module, weight_decay: float) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self.inner = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )

    def grad_square(self) -> Tensor:
        """Sum of squares of this rank's gradient shards, float64; over all ranks |grad|^2."""
        squares = [
            part.double().square().sum()  # float64 of a part at a time, not of a whole embedding
            for gradient in self._local_gradients()
            for part in gradient.flatten().split(_PART)
        ]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def step(self, lr: float, grad_scale: float) -> None:
        """Update with `grad_scale * grad`, then clear the gradients."""
        for gradient in self._local_gradients():
            gradient.mul_(grad_scale)
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.skip()

    def skip(self) -> None:
        """Clear the gradients, leave the weights."""
        self.inner.zero_grad(set_to_none=True)

    def _local_gradients(self) -> list[Tensor]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def clip_factor(grad_norm: float, max_grad_norm: float) -> float:
    """What scales a gradient of norm `grad_norm` down to at most `max_grad_norm`."""
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))
