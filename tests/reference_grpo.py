"""The GRPO loss written out once more, slowly: padded, one process, float64, dense logits.

Shares no code with `learners` (it imports records only), so agreement means something. Tests
compare values and gradients of the packed, chunked, sharded learner with these loops.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.types import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class ReferenceSettings:
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    aggregation: str = "token_mean"
    constant: int | None = None
    normalize_std: bool = True
    epsilon: float = 1e-6


def advantages(group: TrajectoryGroup, settings: ReferenceSettings) -> list[float | None]:
    """One advantage per trajectory; None where the reward is unknown."""
    known = [t.reward for t in group.trajectories if t.reward is not None]
    if len(known) < 2 or min(known) == max(known):
        return [None if t.reward is None else 0.0 for t in group.trajectories]
    mean = sum(known) / len(known)
    scale = 1.0
    if settings.normalize_std:
        variance = sum((reward - mean) ** 2 for reward in known) / (len(known) - 1)
        scale = variance**0.5 + settings.epsilon
    return [None if t.reward is None else (t.reward - mean) / scale for t in group.trajectories]


def sequence_logprobs(causal_lm: Any, trajectory: Trajectory) -> Tensor:
    """log p of each completion token [L], from the full logits of this one sequence."""
    context = trajectory.train_context_tokens
    context = trajectory.context_tokens if context is None else context
    tokens = torch.tensor([*context.tolist(), *trajectory.token_ids.tolist()])
    logits = causal_lm(input_ids=tokens[None], use_cache=False).logits[0].double()
    logprobs = (logits / trajectory.temperature).log_softmax(-1)
    targets = tokens[len(context) :]
    return logprobs[len(context) - 1 : -1][torch.arange(len(targets)), targets]


def token_loss(
    logprob: Tensor, rollout_logprob: float, advantage: float, s: ReferenceSettings
) -> Tensor:
    """Clipped loss of one token."""
    ratio = (logprob - rollout_logprob).exp()
    clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if s.dual_clip is not None and advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-s.dual_clip * advantage, dtype=torch.float64))
    return loss


def grpo_loss(causal_lm: Any, groups: list[TrajectoryGroup], s: ReferenceSettings) -> Tensor:
    """The full-batch loss with its global denominator."""
    sequences: list[list[Tensor]] = []
    for group in groups:
        for trajectory, advantage in zip(group.trajectories, advantages(group, s), strict=True):
            if advantage is None or not trajectory.loss_mask.any():
                continue
            logprobs = sequence_logprobs(causal_lm, trajectory)
            sequences.append(
                [
                    token_loss(logprobs[t], float(trajectory.rollout_logprobs[t]), advantage, s)
                    for t in range(len(trajectory.token_ids))
                    if trajectory.loss_mask[t]
                ]
            )
    if s.aggregation == "token_mean":
        losses = [loss for sequence in sequences for loss in sequence]
        return torch.stack(losses).sum() / len(losses)
    sums = [torch.stack(sequence).sum() for sequence in sequences]
    if s.aggregation == "seq_mean_token_mean":
        sums = [total / len(sequence) for total, sequence in zip(sums, sequences, strict=True)]
    else:
        assert s.constant is not None
        sums = [total / s.constant for total in sums]
    return torch.stack(sums).sum() / len(sums)
