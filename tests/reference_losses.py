"""Other losses written out once more, slowly: one sequence after the other, dense float64 logits.

Shares no code with `learners` (it imports records only). Each takes the sequences of a whole update
and returns the normalised loss; `Scored` holds what one of them has on its loss tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.types import Trajectory, TrajectoryGroup
from tests.reference_grpo import ReferenceSettings, advantages


@dataclass(frozen=True)
class Scored:
    """One sequence: log-probs [L], all-token distributions [L, V], rollout log-probs, advantage;
    `hinted` are the log-probs in the context it was sampled from, `given` [L] marks tokens that
    nobody sampled.
    """

    logprobs: Tensor
    distribution: Tensor
    rollout: Tensor
    advantage: float
    is_guided: bool
    hinted: Tensor
    given: Tensor


def scored(causal_lm: Any, groups: list[TrajectoryGroup]) -> list[Scored]:
    result: list[Scored] = []
    for group in groups:
        for trajectory, advantage in zip(
            group.trajectories, advantages(group, ReferenceSettings()), strict=True
        ):
            if advantage is None:
                continue
            stripped = trajectory.train_context_tokens
            context = trajectory.context_tokens if stripped is None else stripped
            kept = torch.from_numpy(trajectory.loss_mask)
            targets = torch.from_numpy(trajectory.token_ids).long()
            whole = _distribution(causal_lm, trajectory, context)
            hinted = _distribution(causal_lm, trajectory, trajectory.context_tokens).detach()
            at = (torch.arange(len(targets)), targets)
            chosen = whole[at]
            result.append(
                Scored(
                    chosen[kept],
                    whole[kept].exp(),
                    torch.from_numpy(trajectory.rollout_logprobs).double()[kept],
                    advantage,
                    stripped is not None,
                    hinted[at][kept],
                    (torch.arange(len(targets)) < trajectory.num_given)[kept],
                )
            )
    return result


def _distribution(causal_lm: Any, trajectory: Trajectory, context: np.ndarray) -> Tensor:
    """Log-probs [L, V] of every token at each place of the completion."""
    tokens = torch.tensor([*context.tolist(), *trajectory.token_ids.tolist()])
    logits = causal_lm(input_ids=tokens[None], use_cache=False).logits[0].double()
    return (logits / trajectory.temperature).log_softmax(-1)[len(context) - 1 : -1]


def _clipped(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def gspo(rows: list[Scored]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ratio = (row.logprobs - row.rollout).mean().exp()
        total = total + _clipped(ratio, row.advantage, 0.2, 0.3)
    return total / len(rows)


def cispo(rows: list[Scored]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        weight = (row.logprobs - row.rollout).detach().exp().clamp(max=2.0)
        total = total - (weight * row.advantage * row.logprobs).sum()
    return total / sum(len(row.logprobs) for row in rows)


def gmpo(rows: list[Scored]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logs = row.logprobs - row.rollout
        logs = logs.clamp(max=0.4) if row.advantage >= 0 else logs.clamp(min=-0.4)
        total = total - row.advantage * logs.mean().exp()
    return total / len(rows)


def sapo(rows: list[Scored]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tau = 1.0 if row.advantage > 0 else 1.05
        ratio = (row.logprobs - row.rollout).exp()
        gate = 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
        total = total - (gate * row.advantage).mean()
    return total / len(rows)


def entropies(row: Scored) -> Tensor:
    return -(row.distribution * row.distribution.log()).sum(-1)


def nucleus_entropies(row: Scored, mass: float) -> Tensor:
    values: list[Tensor] = []
    for p in row.distribution:
        ordered = p.sort(descending=True).values
        num_kept = int((ordered.cumsum(0) < mass).sum()) + 1
        q = ordered[:num_kept] / ordered[:num_kept].sum()
        values.append(-(q * q.log()).sum())
    return torch.stack(values)


def clipped(rows: list[Scored]) -> Tensor:
    """PPO with the dual clip at 3; mean over all tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        losses = _clipped((row.logprobs - row.rollout).exp(), row.advantage, 0.2, 0.28)
        if row.advantage < 0:
            losses = losses.clamp(max=-3.0 * row.advantage)
        total = total + losses.sum()
    return total / sum(len(row.logprobs) for row in rows)


def truncated(rows: list[Scored]) -> Tensor:
    """Decoupled PPO in the first update, where the ratio is 1, weighted by min(w, 2)."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        weight = (row.logprobs.detach() - row.rollout).exp().clamp(max=2.0)
        ratio = (row.logprobs - row.logprobs.detach()).exp()
        total = total - (weight * ratio * row.advantage).sum()
    return total / sum(len(row.logprobs) for row in rows)


def second_moment(rows: list[Scored], bound: float) -> Tensor:
    """PPO without tokens whose (log w)^2 lift the running mean, smallest first, over `bound`."""
    squares = torch.cat([(row.logprobs.detach() - row.rollout).square() for row in rows])
    ordered = squares.sort().values.tolist()
    kept = [v for i, v in enumerate(ordered) if sum(ordered[: i + 1]) / (i + 1) <= bound]
    assert 0 < len(kept) < len(ordered)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        losses = _clipped((row.logprobs - row.rollout).exp(), row.advantage, 0.2, 0.28)
        total = total + losses[(row.logprobs.detach() - row.rollout).square() <= kept[-1]].sum()
    return total / len(squares)


def entropy_bonus(rows: list[Scored], coefficient: float) -> Tensor:
    pooled = torch.cat([entropies(row) for row in rows])
    return -coefficient * pooled.mean()


def entropy_advantage(rows: list[Scored]) -> Tensor:
    """PPO on A + min(.4 H, |A| / 2), H fixed."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        bonus = (0.4 * entropies(row).detach()).clamp(max=abs(row.advantage) / 2)
        ratio = (row.logprobs - row.rollout).exp()
        advantage = row.advantage + bonus
        losses = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        total = total - losses.sum()
    return total / sum(len(row.logprobs) for row in rows)


def kl(rows: list[Scored], estimator: str) -> Tensor:
    """To a reference that has the rollout's log-probs less .3; hinted rows only in the divisor."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        gap = row.logprobs - (row.rollout.float() - 0.3).double()
        if estimator == "k3":
            losses = ((-gap).exp() - 1 + gap).clamp(max=10.0)
        else:
            fixed = gap.detach()
            to_go = torch.stack([fixed[i:].sum() for i in range(len(fixed))])
            losses = to_go * row.logprobs
        total = total + (0.0 if row.is_guided else losses.sum())
    return total / sum(len(row.logprobs) for row in rows)


def siren_penalty(rows: list[Scored], anchor: float, beta: float, mass: float) -> Tensor:
    """beta (H - anchor)^2, squared after the mean over all sequences."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        values = nucleus_entropies(row, mass)
        threshold = np.quantile(values.detach().numpy(), 0.8)
        peaks = values[values > threshold]
        if len(peaks):
            total = total + peaks.mean()
    return beta * (total / len(rows) - anchor) ** 2


def forking_grpo(rows: list[Scored]) -> Tensor:
    """80/20: only tokens at or above the batch's 0.8-quantile of entropy; divisor all tokens."""
    pooled = torch.cat([entropies(row).detach() for row in rows])
    threshold = torch.quantile(pooled, 0.8)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        losses = _clipped((row.logprobs - row.rollout).exp(), row.advantage, 0.2, 0.28)
        total = total + losses[entropies(row).detach() >= threshold].sum()
    return total / len(pooled)


def guide(rows: list[Scored]) -> Tensor:
    """PPO on plain rows, r / (r + gamma) on guided ones; mean over sequences of token means."""
    ratios = [(row.logprobs - row.rollout).exp() for row in rows]
    pooled = torch.cat([r.detach() for r, row in zip(ratios, rows, strict=True) if row.is_guided])
    gamma = torch.quantile(pooled, 0.9)
    total = torch.zeros((), dtype=torch.float64)
    for ratio, row in zip(ratios, rows, strict=True):
        if row.is_guided:
            losses = -ratio / (ratio + gamma) * row.advantage
        else:
            losses = _clipped(ratio, row.advantage, 0.2, 0.2)
        total = total + losses.mean()
    return total / len(rows)


def luffy(rows: list[Scored]) -> Tensor:
    """PPO on sampled tokens, r / (r + .1) on hinted ones, pi / (pi + .1) on given ones."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ratio = (row.logprobs - row.rollout).exp()
        probability = row.logprobs.exp()
        shaped = -ratio / (ratio + 0.1) * row.advantage
        learned = -probability / (probability + 0.1) * row.advantage
        sampled = shaped if row.is_guided else _clipped(ratio, row.advantage, 0.2, 0.2)
        total = total + torch.where(row.given, learned, sampled).mean()
    return total / len(rows)


def luffy_apart(rows: list[Scored]) -> Tensor:
    """Likewise with pi's shaped share held fixed, as the weight of a policy step."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        own = (row.logprobs - row.logprobs.detach()).exp()
        shift = (row.logprobs.detach() - row.hinted).exp()
        engine = (row.hinted - row.rollout).exp().clamp(max=2.0)
        probability = row.logprobs.detach().exp()
        step = _clipped(own, row.advantage, 0.2, 0.2)
        plain = _clipped((row.logprobs - row.rollout).exp(), row.advantage, 0.2, 0.2)
        sampled = shift / (shift + 0.1) * engine * step if row.is_guided else plain
        learned = probability / (probability + 0.1) * step
        total = total + torch.where(row.given, learned, sampled).mean()
    return total / len(rows)


def guide_apart(rows: list[Scored]) -> Tensor:
    """On guided rows PPO times f(context shift) times min(engine, 2), both without gradient."""
    shifts = [(row.logprobs.detach() - row.hinted).exp() for row in rows]
    pooled = torch.cat([s for s, row in zip(shifts, rows, strict=True) if row.is_guided])
    gamma = torch.quantile(pooled, 0.9)
    total = torch.zeros((), dtype=torch.float64)
    for row, shift in zip(rows, shifts, strict=True):
        ratio = (row.logprobs - row.logprobs.detach()).exp()
        engine = (row.hinted - row.rollout).exp().clamp(max=2.0)
        weight = shift / (shift + gamma) * engine
        if not row.is_guided:
            ratio, weight = (row.logprobs - row.rollout).exp(), torch.ones_like(weight)
        total = total + (weight * _clipped(ratio, row.advantage, 0.2, 0.2)).mean()
    return total / len(rows)
