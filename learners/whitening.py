"""Advantages whitened over the global batch (REINFORCE++, PPO).

Invariant: mean and variance are those of all ranks and micro-batches of the step together, so they
are collective; every rank calls with its own packs. Called by the learner when a credit declares
`whitening`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from learners.batch import MicroBatch
from learners.credit import Whitening
from learners.segments import sequence_means

_EPSILON = 1e-8


def whiten(packs: Sequence[MicroBatch], kind: Whitening) -> list[MicroBatch]:
    """(A - mean) / sqrt(unbiased variance + 1e-8), counting each loss token or each sequence once.

    A batch of fewer than two values has no contrast: all advantages become 0.
    """
    moments = torch.zeros(3, dtype=torch.float64)
    for pack in packs:
        values = _values(pack, kind)
        moments += torch.stack(
            [torch.tensor(float(len(values))).double(), values.sum(), values.square().sum()]
        )
    dist.all_reduce(moments)
    count, total, squares = moments.tolist()
    if count < 2:
        return [replace(p, advantages=torch.zeros_like(p.advantages)) for p in packs]
    mean = total / count
    variance = max(0.0, (squares - count * mean**2) / (count - 1))
    scale = (variance + _EPSILON) ** -0.5
    return [replace(p, advantages=(p.advantages - mean) * scale) for p in packs]


def _values(pack: MicroBatch, kind: Whitening) -> Tensor:
    advantages = pack.advantages.double()
    if kind == "tokens":
        return advantages.cpu()
    return sequence_means(advantages, pack)[pack.sequence_loss_tokens > 0].cpu()
