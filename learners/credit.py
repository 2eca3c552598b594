"""Credit: rewards of a group to one advantage per token (extension point P4).

Invariant: credit sees whole groups only, and a trajectory whose reward is unknown (None) neither
gets credit nor shapes its siblings' credit. Called by the learner at batch time, so a group that
was scored again needs no new rollouts.
"""

from typing import Protocol

import numpy as np

from cluster.config import Plugin
from cluster.plugins import build
from cluster.types import TrajectoryGroup

CREDITS = {"grpo": "learners.credit:GroupNormalized"}


class Credit(Protocol):
    def assign(self, group: TrajectoryGroup) -> list[np.ndarray | None]:
        """Advantages float32 [L] per trajectory, in order; None leaves the trajectory out."""
        ...


class GroupNormalized:
    """(R_i - mean) / (std + epsilon) over the known rewards of the group, on every token of row i.

    GRPO (arXiv 2402.03300) with the unbiased std; `normalize_std=False` is Dr. GRPO (arXiv
    2503.20783). Fewer than two known rewards or zero variance give 0. Rewards [1, 0, 0, 0] give
    1.5, -.5, -.5, -.5.
    """

    def __init__(self, normalize_std: bool = True, epsilon: float = 1e-6) -> None:
        self._normalize_std = normalize_std
        self._epsilon = epsilon

    def assign(self, group: TrajectoryGroup) -> list[np.ndarray | None]:
        known = np.array([reward for reward in group.rewards if reward is not None])
        is_uniform = len(known) < 2 or np.ptp(known) == 0
        center = known.mean() if len(known) else 0.0
        scale = 1.0
        if self._normalize_std and not is_uniform:
            scale = known.std(ddof=1) + self._epsilon
        return [
            None
            if trajectory.reward is None
            else np.full(
                len(trajectory.token_ids),
                0.0 if is_uniform else (trajectory.reward - center) / scale,
                dtype=np.float32,
            )
            for trajectory in group.trajectories
        ]


def build_credit(config: Plugin) -> Credit:
    """The configured credit; raises `ConfigError` naming `objective.credit`."""
    return build(config.use, config.settings, CREDITS, "objective.credit")
