"""Groups that were scored by an older rubric and wait in the buffer: keep, rescore or drop them.

Invariant: a group is changed only while it is leased here, so the learner never trains on one that
is half changed; facts are stored, not advantages, so a re-scored group gets new advantages for
free. Owned by `actors.reward_admin`.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from actors.reward_pool import RewardPool
from cluster import wire
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.reward_state import RUBRIC
from cluster.types import TrajectoryGroup

CHOICES = ("keep", "rescore", "drop")
REASON = "reward_swapped"
OnDrop = Callable[[list[str], str], Awaitable[None]]


async def _nobody(group_ids: list[str], reason: str) -> None:
    """Until the controller is told of drops there is no slot to free."""


class BufferedGroups:
    """`on_drop` is told the ids that left the buffer, so that their slots are freed."""

    def __init__(self, buffer: ReplayBuffer, capacity: int, skip_uniform: bool) -> None:
        self._buffer = buffer
        self._capacity = capacity
        self._skip_uniform = skip_uniform
        self.on_drop: OnDrop = _nobody

    def write_as(self, epoch: int) -> None:
        """Change groups in the name of the controller of `epoch`."""
        self._buffer.epoch = epoch

    @classmethod
    def of(cls, config: Config, run_id: str, url: str) -> "BufferedGroups":
        buffer = ReplayBuffer(
            connect(url),
            run_id,
            capacity_groups=config.buffer.capacity_groups,
            lease_s=config.buffer.lease_s,
            max_deliveries=config.buffer.max_deliveries,
        )
        return cls(buffer, config.buffer.capacity_groups, config.tasks.skip_uniform)

    def choice(self, arguments: dict[str, Any]) -> str:
        choice = str(arguments.get("buffered", "keep"))
        if choice not in CHOICES:
            raise ConfigError(f"--buffered must be one of {', '.join(CHOICES)}, got {choice!r}")
        return choice

    async def sample(self, count: int) -> list[tuple[TrajectoryGroup, bytes]]:
        """Up to `count` stored groups at random, with their bytes."""
        groups = await asyncio.to_thread(self._buffer.sample, count)
        return [(group, wire.encode(group)) for group in groups]

    async def treat(self, choice: str, label: str, pool: RewardPool) -> int:
        """Apply `choice` to the ready groups of other versions; returns how many it changed.

        Groups that the learner has leased already are trained on as they are.
        """
        if choice == "keep":
            return 0
        owner = f"rewards-{uuid.uuid4().hex}"
        headers = await asyncio.to_thread(
            self._buffer.claim, self._capacity, owner=owner, min_policy_version=0, wait_s=0.0
        )
        held = [header.group_id for header in headers]
        old = [h.group_id for h in headers if h.reward_versions.get(RUBRIC) != label]
        dropped: list[str] = []
        try:
            for group_id in old:
                if choice == "drop" or not await self._rescore(group_id, owner, pool):
                    await asyncio.to_thread(self._buffer.drop, group_id, REASON)
                    dropped.append(group_id)
        finally:
            await asyncio.to_thread(
                self._buffer.release, [g for g in held if g not in dropped], owner
            )
            await self.on_drop(dropped, REASON)
        return len(old)

    async def _rescore(self, group_id: str, owner: str, pool: RewardPool) -> bool:
        """Whether the group, scored by the live version, is still worth training on."""
        await asyncio.to_thread(self._buffer.renew, owner)
        [group] = await asyncio.to_thread(self._buffer.fetch, [group_id])
        _, encoded = await pool.score(wire.encode(group))
        scored = wire.decode(encoded, TrajectoryGroup)
        if not scored.is_trainable or (self._skip_uniform and scored.is_uniform):
            return False
        await asyncio.to_thread(self._buffer.replace, scored)
        return True
