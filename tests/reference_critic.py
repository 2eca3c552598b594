"""PPO's credit and value loss written out once more, slowly: one sequence after the other.

Shares no code with `learners` (it imports records only): dense float64 passes over a Hugging Face
decoder, and plain loops over the tokens that the policy wrote.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.types import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Valued:
    """One sequence: values now [L] with gradient, values before the step, advantages, returns."""

    values: Tensor
    before: list[float]
    advantages: list[float]
    returns: list[float]
    is_guided: bool


def _values(decoder: Any, head: Tensor, bias: Tensor, trajectory: Trajectory) -> Tensor:
    stripped = trajectory.train_context_tokens
    context = trajectory.context_tokens if stripped is None else stripped
    tokens = torch.tensor([*context.tolist(), *trajectory.token_ids.tolist()])
    hidden = decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    before_each = hidden[len(context) - 1 : -1][torch.from_numpy(trajectory.loss_mask)]
    return before_each @ head + bias


def _sums(rewards: list[float], values: list[float], gamma: float, decay: float) -> list[float]:
    result = [0.0] * len(values)
    for t in range(len(values)):
        for k in range(t, len(values)):
            following = values[k + 1] if k + 1 < len(values) else 0.0
            delta = rewards[k] + gamma * following - values[k]
            result[t] += (gamma * decay) ** (k - t) * delta
    return result


def valued(
    decoder: Any,
    now: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor],
    groups: list[TrajectoryGroup],
    gamma: float,
    lambdas: tuple[float, float],
) -> list[Valued]:
    """All sequences with a reward; `now` and `before` are weight [D] and bias of the head."""
    rows: list[Valued] = []
    for trajectory in (t for group in groups for t in group.trajectories):
        if trajectory.reward is None:
            continue
        values = _values(decoder, *now, trajectory)
        earlier = _values(decoder, *before, trajectory).tolist()
        rewards = [0.0] * (len(earlier) - 1) + [trajectory.reward]
        is_guided = trajectory.train_context_tokens is not None
        of_policy = 1.0 if is_guided else lambdas[0]
        targets = _sums(rewards, earlier, gamma, lambdas[1])
        rows.append(
            Valued(
                values,
                earlier,
                _sums(rewards, earlier, gamma, of_policy),
                [value + target for value, target in zip(earlier, targets, strict=True)],
                is_guided,
            )
        )
    return rows


def value_loss(rows: list[Valued], clip: float) -> Tensor:
    """Mean over the tokens of plain rows."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        if row.is_guided:
            continue
        count += len(row.before)
        for value, before, target in zip(row.values, row.before, row.returns, strict=True):
            near = value.clamp(before - clip, before + clip)
            total = total + torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
    return total / count


def explained_variance(rows: list[Valued]) -> float:
    plain = [row for row in rows if not row.is_guided]
    returns = torch.tensor([r for row in plain for r in row.returns], dtype=torch.float64)
    values = torch.tensor([v for row in plain for v in row.before], dtype=torch.float64)
    return 1 - ((returns - values).var() / returns.var()).item()
