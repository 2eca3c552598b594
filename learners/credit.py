"""Credit: rewards of a group to one advantage per token (extension point P4).

Invariant: credit sees whole groups only, and a trajectory whose reward is unknown (None) neither
gets credit nor shapes its siblings' credit. What needs the whole batch is declared, not done here:
`whitening` is carried out by `learners.whitening` when all groups of the step are in, and a
`ValueBased` credit is finished by its `estimate` when the critic has filled in values. Called by
the learner at batch time, so a group that was scored again needs no new rollouts.
"""

from abc import ABC, abstractmethod
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from cluster.config import CriticSection, Plugin
from cluster.errors import ConfigError
from cluster.plugins import build
from cluster.types import Trajectory, TrajectoryGroup, TrajectoryStatus
from learners.batch import MicroBatch

CREDITS = {
    "grpo": "learners.credit:GroupNormalized",
    "rloo": "learners.credit:LeaveOneOut",
    "reinforce_pp": "learners.credit:BatchNormalized",
    "process": "learners.process_credit:ProcessNormalized",
    "gae": "learners.gae:GeneralizedAdvantage",
}

Whitening = Literal["none", "tokens", "sequences"]


class Credit(Protocol):
    def assign(self, group: TrajectoryGroup) -> list[np.ndarray | None]:
        """Advantages float32 [L] per trajectory, in order; None leaves the trajectory out.

        A credit may also have `whitening` ("tokens" or "sequences"): subtract the mean and divide
        by the std of its advantages over the global batch, each token or each sequence once.
        """
        ...


@runtime_checkable
class ValueBased(Protocol):
    """A credit that needs the critic. What its `assign` returns are rewards per token.

    May also have `needs_reference = True` (fill `rows.ref_logprobs`).
    """

    def assign(self, group: TrajectoryGroup) -> list[np.ndarray | None]: ...

    def estimate(self, rows: MicroBatch) -> MicroBatch:
        """`rows`, whose `advantages` are rewards and whose `values` are known, with advantages and
        with the `returns` that the critic learns.
        """
        ...


class _Outcome(ABC):
    """Known rewards of a group; `drop_truncated` leaves out completions cut by the token limit.

    Leaving them out is DAPO's overlong filtering (arXiv 2503.14476); its soft punishment is the
    verifier `length`, because a length is a reason for a reward.
    """

    def __init__(self, drop_truncated: bool = False) -> None:
        self._drop_truncated = drop_truncated

    def assign(self, group: TrajectoryGroup) -> list[np.ndarray | None]:
        rewards = [self._reward(trajectory) for trajectory in group.trajectories]
        known = np.array([reward for reward in rewards if reward is not None], dtype=np.float64)
        values = iter(self._advantages(known))
        return [
            None
            if reward is None
            else np.full(len(trajectory.token_ids), next(values), dtype=np.float32)
            for reward, trajectory in zip(rewards, group.trajectories, strict=True)
        ]

    def _reward(self, trajectory: Trajectory) -> float | None:
        is_dropped = self._drop_truncated and trajectory.status is TrajectoryStatus.TRUNCATED
        return None if is_dropped else trajectory.reward

    @abstractmethod
    def _advantages(self, rewards: np.ndarray) -> np.ndarray:
        """[K] known rewards to [K] advantages; K may be 0."""


class GroupNormalized(_Outcome):
    """(R_i - mean) / (std + epsilon) over the known rewards of the group, on every token of row i.

    GRPO (arXiv 2402.03300) with the unbiased std; `normalize_std=False` is Dr. GRPO (arXiv
    2503.20783). Fewer than two known rewards or zero variance give 0. Rewards [1, 0, 0, 0] give
    1.5, -.5, -.5, -.5.
    """

    def __init__(
        self, normalize_std: bool = True, epsilon: float = 1e-6, drop_truncated: bool = False
    ) -> None:
        super().__init__(drop_truncated)
        self._normalize_std = normalize_std
        self._epsilon = epsilon

    def _advantages(self, rewards: np.ndarray) -> np.ndarray:
        if len(rewards) < 2 or np.ptp(rewards) == 0:
            return np.zeros(len(rewards))
        scale = rewards.std(ddof=1) + self._epsilon if self._normalize_std else 1.0
        return (rewards - rewards.mean()) / scale


class LeaveOneOut(_Outcome):
    """RLOO (arXiv 2402.14740): R_i minus the mean of the other known rewards of the group.

    Fewer than two known rewards give 0. Rewards [1, 0, 0, 0] give 1, -1/3, -1/3, -1/3.
    """

    def _advantages(self, rewards: np.ndarray) -> np.ndarray:
        if len(rewards) < 2:
            return np.zeros(len(rewards))
        return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)


class BatchNormalized(_Outcome):
    """REINFORCE++ (arXiv 2501.03262): rewards, whitened over the global batch.

    `baseline="group"` first subtracts the group's mean, `"none"` nothing. `whitening="tokens"`
    weights a trajectory by its length, as in the released code; `"sequences"` counts each once.
    Groups [1, 0, 0, 0] and [1, 1, 1, 0] of one-token rows give 1.620185, -.540062 and .540062,
    -1.620185.
    """

    def __init__(
        self,
        baseline: Literal["group", "none"] = "group",
        whitening: Whitening = "tokens",
        drop_truncated: bool = False,
    ) -> None:
        super().__init__(drop_truncated)
        if baseline not in ("group", "none"):
            raise ValueError(f"baseline must be group or none, got {baseline!r}")
        if whitening not in get_args(Whitening):
            raise ValueError(
                f"whitening must be one of {', '.join(get_args(Whitening))}, got {whitening!r}"
            )
        self._baseline = baseline
        self.whitening: Whitening = whitening

    def _advantages(self, rewards: np.ndarray) -> np.ndarray:
        if self._baseline == "none" or len(rewards) == 0:
            return rewards
        return rewards - rewards.mean()


def build_credit(config: Plugin) -> Credit:
    """The configured credit; raises `ConfigError` naming `objective.credit`."""
    return build(config.use, config.settings, CREDITS, "objective.credit")


def check_critic(section: CriticSection | None, credit: Credit) -> None:
    """Refuse a credit without the critic that it needs, and a critic that nobody asks."""
    if isinstance(credit, ValueBased) and section is None:
        raise ConfigError("critic: objective.credit needs values, so this section must be there")
    if section is not None and not isinstance(credit, ValueBased):
        raise ConfigError("critic: objective.credit needs no values; use gae, or leave critic out")


def is_per_token(credit: Credit) -> bool:
    """Whether tokens of one sequence may get different advantages; a plug-in declares that."""
    return isinstance(credit, ValueBased) or getattr(credit, "is_per_token", False)


def whitening_of(credit: Credit) -> Whitening:
    """What `credit` declares; a plug-in that says nothing wants none."""
    return getattr(credit, "whitening", "none")
