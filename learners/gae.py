"""Generalised advantage estimation over a critic's values: the credit of PPO, VC-PPO and VAPO.

Invariant: time runs over the tokens that the policy wrote; those of others are stepped over, they
carry neither value nor advantage. A reward that falls on one of them counts for the last token
that the policy wrote before it. Sequences never mix.
"""

# ruff: noqa: F722 (shapes in annotations)

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cluster.types import Trajectory, TrajectoryGroup
from learners.batch import MicroBatch
from learners.credit import Whitening
from learners.process_credit import step_scores
from learners.segments import discounted_sums


class GeneralizedAdvantage:
    """A_t = delta_t + gamma lambda A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t (arXiv 1506.02438).

    `lambda_policy` is for the advantages, `lambda_critic` for the critic's targets A + V (decoupled
    GAE, arXiv 2503.01491). `length_alpha` a sets lambda_policy = 1 - 1 / max(a L, 1) from the L
    tokens written (VAPO, arXiv 2504.05118, which takes .05). Rewards are the reward at the last
    token, `process_weight` times the step scores of verifier `process_signal` at the step ends, and
    -`kl_coefficient` (log rollout - log reference) per token. `bootstrap_truncated` takes the last
    value for what follows a truncated completion, else 0. Advantages are whitened over the tokens
    of the step. Hinted rows are conditioned on another context than they were sampled from, so they
    take lambda 1, no KL and no last value. Rewards [0, 0, 1], values [.2, .5, .6], lambda .95: A =
    .756, .48, .4.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        lambda_policy: float = 0.95,
        lambda_critic: float = 1.0,
        length_alpha: float | None = None,
        process_signal: str | None = None,
        process_weight: float = 1.0,
        kl_coefficient: float = 0.0,
        bootstrap_truncated: bool = False,
        whitening: bool = True,
    ) -> None:
        for name, value in (
            ("gamma", gamma), ("lambda_policy", lambda_policy), ("lambda_critic", lambda_critic),
        ):  # fmt: skip
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if length_alpha is not None and length_alpha <= 0:
            raise ValueError(f"length_alpha must be positive, got {length_alpha}")
        if kl_coefficient < 0:
            raise ValueError(f"kl_coefficient must be at least 0, got {kl_coefficient}")
        self._gamma = gamma
        self._lambda_policy = lambda_policy
        self._lambda_critic = lambda_critic
        self._length_alpha = length_alpha
        self._process_signal = process_signal
        self._process_weight = process_weight
        self._kl_coefficient = kl_coefficient
        self._bootstrap_truncated = bootstrap_truncated
        self.whitening: Whitening = "tokens" if whitening else "none"
        self.needs_reference = kl_coefficient > 0

    def assign(self, group: TrajectoryGroup) -> list[np.ndarray | None]:
        """Rewards [L] per trajectory, on tokens the policy wrote; None where one is unknown."""
        return [self._rewards(trajectory) for trajectory in group.trajectories]

    def estimate(self, rows: MicroBatch) -> MicroBatch:
        assert rows.values is not None
        rewards = rows.advantages
        if self._kl_coefficient > 0:
            assert rows.ref_logprobs is not None
            gap = rows.rollout_logprobs - rows.ref_logprobs
            rewards = rewards - self._kl_coefficient * torch.where(rows.is_guided, 0.0, gap)
        deltas = rewards + self._gamma * self._next_values(rows, rows.values) - rows.values
        of_policy = torch.where(rows.is_guided, 1.0, self._policy_lambdas(rows))
        of_critic = torch.full_like(of_policy, self._lambda_critic)
        return replace(
            rows,
            advantages=discounted_sums(deltas, self._gamma * of_policy, rows),
            returns=rows.values + discounted_sums(deltas, self._gamma * of_critic, rows),
        )

    def _rewards(self, trajectory: Trajectory) -> np.ndarray | None:
        written = np.flatnonzero(trajectory.loss_mask)
        steps = self._steps(trajectory)
        if trajectory.reward is None or steps is None or len(written) == 0:
            return None
        rewards = np.zeros(len(trajectory.token_ids), dtype=np.float32)
        rewards[written[-1]] = trajectory.reward
        for token_end, score in steps:
            before = written[written < token_end]
            if len(before):
                rewards[before[-1]] += self._process_weight * score
        return rewards

    def _steps(self, trajectory: Trajectory) -> list[tuple[int, float]] | None:
        """Step scores, [] when none are asked for; None where the verifier gave none."""
        if self._process_signal is None:
            return []
        return step_scores(trajectory, self._process_signal)

    def _next_values(self, rows: MicroBatch, values: Tensor) -> Float[Tensor, " N"]:
        """Value of the state after each loss token."""
        is_last = torch.ones_like(rows.is_truncated)
        is_last[:-1] = rows.sequence_ids[:-1] != rows.sequence_ids[1:]
        at_end = values if self._bootstrap_truncated else torch.zeros_like(values)
        at_end = torch.where(rows.is_truncated & ~rows.is_guided, at_end, 0.0)
        return torch.where(is_last, at_end, values.roll(-1))

    def _policy_lambdas(self, rows: MicroBatch) -> Float[Tensor, " N"]:
        if self._length_alpha is None:
            return torch.full_like(rows.advantages, self._lambda_policy)
        lengths = rows.sequence_loss_tokens[rows.sequence_ids].to(rows.advantages.dtype)
        return 1 - 1 / (self._length_alpha * lengths).clamp(min=1)
