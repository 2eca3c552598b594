"""The reward actor: scores whole groups with the rubric and puts them into the replay buffer.

Invariant: a group enters the buffer once, frozen, with every verdict stamped by its reward
version; an abstained trajectory has no reward rather than a zero. Created by
`actors.reward_pool`.
"""

import asyncio
import os

import msgspec
import numpy as np

from cluster import log, wire
from cluster.config import BufferSection, VerifierConfig
from cluster.errors import BufferFullError, StageError, boundary
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.types import TrajectoryGroup, TrajectoryStatus
from rewards.rubric import Rubric

BACK_OFF_S = (0.05, 2.0)


class GroupSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller learns of a scored group; the tokens stay in the buffer."""

    group_id: str
    outcome: str  # added, duplicate, uniform, unscored, evaluated
    rewards: list[float | None]
    passed: list[bool | None]  # by the first verifier of the config; None where it abstained
    signals: dict[str, list[float | None]]
    reward_versions: dict[str, str]
    completion_tokens: list[int]
    num_truncated: int
    is_uniform: bool
    min_policy_version: int
    max_latency_s: float


class RewardWorker:
    """One rubric and one connection to the buffer."""

    def __init__(
        self,
        index: int,
        verifiers: dict[str, VerifierConfig],
        run_id: str,
        buffer_url: str,
        buffer: BufferSection,
        run_dir: str,
    ) -> None:
        log.setup(f"reward-{index}", run_dir)
        self._rubric = Rubric(verifiers)
        self._buffer = ReplayBuffer(
            connect(buffer_url),
            run_id,
            capacity_groups=buffer.capacity_groups,
            lease_s=buffer.lease_s,
            max_deliveries=buffer.max_deliveries,
        )

    async def ping(self) -> int:
        return os.getpid()

    async def score(self, encoded: bytes) -> tuple[GroupSummary, bytes]:
        """Score without keeping (evaluation): the summary and the encoded scored group."""
        with boundary("score"):
            group = await self._rubric.score(wire.decode(encoded, TrajectoryGroup))
            return summarize(group, "evaluated"), wire.encode(group)

    async def score_and_add(
        self, encoded: bytes, skip_uniform: bool, deadline_s: float
    ) -> GroupSummary:
        """Score, then add to the buffer unless the group can teach nothing; waits while it is
        full.
        """
        with boundary("score"):
            group = await self._rubric.score(wire.decode(encoded, TrajectoryGroup))
            if not group.is_trainable:
                return summarize(group, "unscored")
            if skip_uniform and group.is_uniform:
                return summarize(group, "uniform")
            return summarize(group, await self._add(group, deadline_s))

    async def _add(self, group: TrajectoryGroup, deadline_s: float) -> str:
        pause, limit = BACK_OFF_S
        waited = 0.0
        while True:
            try:
                return str(await asyncio.to_thread(self._buffer.add, group))
            except BufferFullError as error:
                if waited >= deadline_s:
                    raise StageError("score", f"buffer full for {waited:.0f} s: {error}") from error
                await asyncio.sleep(pause)
                waited, pause = waited + pause, min(limit, 2 * pause)


def summarize(group: TrajectoryGroup, outcome: str) -> GroupSummary:
    """Counts and scores of a scored group."""
    trajectories = group.trajectories
    names = [verdict.name for verdict in trajectories[0].verdicts]
    scores = {name: [t.verdicts[i].score for t in trajectories] for i, name in enumerate(names)}
    decisive = scores[names[0]]
    return GroupSummary(
        group_id=group.group_id,
        outcome=outcome,
        rewards=group.rewards,
        passed=[None if score is None else score >= 0.5 for score in decisive],
        signals=scores,
        reward_versions=group.reward_versions,
        completion_tokens=[len(t.token_ids) for t in trajectories],
        num_truncated=sum(t.status is TrajectoryStatus.TRUNCATED for t in trajectories),
        is_uniform=group.is_uniform,
        min_policy_version=group.min_policy_version,
        max_latency_s=float(np.max([v.latency_s for t in trajectories for v in t.verdicts])),
    )
