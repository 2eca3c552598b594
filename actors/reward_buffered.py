"""Groups that were scored by an older rubric and wait in the buffer: keep, rescore or drop them.

Invariant: a group is changed only while it is leased here, a few at a time, so the learner never
trains on one that is half changed and always finds others; facts are stored, not advantages, so a
re-scored group gets new advantages for free. A group whose checks abstain keeps the rewards it has
where it would be lost otherwise. Owned by `actors.reward_admin`.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from actors.reward_pool import RewardPool
from actors.reward_set import WorkerSet
from cluster import wire
from cluster.config import Config
from cluster.errors import BufferUnavailableError, ConfigError, HoneError, boundary
from cluster.redis_client import OUTAGE_S, connect
from cluster.replay_buffer import ReplayBuffer
from cluster.reward_state import RUBRIC
from cluster.types import TrajectoryGroup

CHOICES = ("keep", "rescore", "drop")
REASON = "reward_swapped"
BATCH = 4  # groups in hand at a time; the learner may take all the others
log = logging.getLogger(__name__)
OnDrop = Callable[[list[str], str], Awaitable[None]]


async def _nobody(group_ids: list[str], reason: str) -> None:
    """Until the controller is told of drops there is no slot to free."""


class Treated(NamedTuple):
    """Groups taken in hand, and those of them that stay as they were because checks abstained."""

    num_groups: int = 0
    num_unscored: int = 0


class BufferedGroups:
    """`on_drop` is told the ids that left the buffer, so that their slots are freed."""

    def __init__(self, buffer: ReplayBuffer, lease_s: float, skip_uniform: bool) -> None:
        self._buffer = buffer
        self._lease_s = lease_s
        self._skip_uniform = skip_uniform
        self._late: set[asyncio.Task[None]] = set()
        self.on_drop: OnDrop = _nobody

    def write_as(self, epoch: int) -> None:
        """Change groups in the name of the controller of `epoch`."""
        self._buffer.epoch = epoch

    @classmethod
    def of(cls, config: Config, run_id: str, url: str) -> "BufferedGroups":
        buffer = ReplayBuffer(
            connect(url, retry_s=OUTAGE_S),
            run_id,
            capacity_groups=config.buffer.capacity_groups,
            lease_s=config.buffer.lease_s,
            max_deliveries=config.buffer.max_deliveries,
        )
        return cls(buffer, config.buffer.lease_s, config.tasks.skip_uniform)

    def choice(self, arguments: dict[str, Any]) -> str:
        choice = str(arguments.get("buffered", "keep"))
        if choice not in CHOICES:
            raise ConfigError(f"--buffered must be one of {', '.join(CHOICES)}, got {choice!r}")
        return choice

    async def sample(self, count: int) -> list[tuple[TrajectoryGroup, bytes]]:
        """Up to `count` stored groups at random, with their bytes."""
        groups = await asyncio.to_thread(self._buffer.sample, count)
        return [(group, wire.encode(group)) for group in groups]

    async def treat(self, choice: str, label: str, pool: RewardPool) -> Treated:
        """Apply `choice` to the ready groups of other versions than the live `label`.

        Groups that the learner has leased already are trained on as they are. Stops when another
        version goes live.
        """
        if choice == "keep":
            return Treated()
        ready = await asyncio.to_thread(self._buffer.ready)
        old = [h.group_id for h in ready if h.reward_versions.get(RUBRIC) != label]
        num_groups = num_unscored = 0
        for start in range(0, len(old), BATCH):
            if pool.live.label != label:
                break
            some = await self._treat_some(choice, old[start : start + BATCH], pool)
            num_groups += some.num_groups
            num_unscored += some.num_unscored
        return Treated(num_groups, num_unscored)

    def treat_late(self, choice: str, label: str, pool: RewardPool, before: WorkerSet) -> None:
        """Treat again the groups that were under way at the cut-over, when `before` has added
        them. Does not wait.
        """
        if choice == "keep":
            return
        task = asyncio.create_task(self._treat_late(choice, label, pool, before))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    def stop(self) -> None:
        for task in self._late:
            task.cancel()

    async def _treat_late(
        self, choice: str, label: str, pool: RewardPool, before: WorkerSet
    ) -> None:
        try:
            with boundary("buffered groups"):
                await before.until_idle()
                late = await self.treat(choice, label, pool)
        except HoneError as error:
            log.warning("groups under way at the cut-over to %s stay as they are: %s", label, error)
        else:
            log.info(
                "%s: %s %d groups that were under way; %d stay as they were: checks abstained",
                label, choice, late.num_groups, late.num_unscored,
            )  # fmt: skip

    async def _treat_some(self, choice: str, group_ids: list[str], pool: RewardPool) -> Treated:
        owner = f"rewards-{uuid.uuid4().hex}"
        held = await asyncio.to_thread(self._buffer.take, group_ids, owner)
        renewal = asyncio.create_task(self._renew(owner))
        dropped: list[str] = []
        unscored: list[str] = []

        async def treat(group_id: str) -> None:
            is_kept = False if choice == "drop" else await self._rescore(group_id, owner, pool)
            if is_kept is None:
                unscored.append(group_id)
            elif not is_kept:
                if await asyncio.to_thread(self._buffer.drop, group_id, REASON, owner):
                    dropped.append(group_id)
                    await self.on_drop([group_id], REASON)  # at once, or it seems to have vanished
                else:
                    log.warning("%s was to be dropped too late: its lease had ended", group_id)

        try:
            results = await asyncio.gather(*map(treat, held), return_exceptions=True)
        finally:
            renewal.cancel()
            kept = [group_id for group_id in held if group_id not in dropped]
            await asyncio.to_thread(self._buffer.release, kept, owner)
        for error in results:
            if error is not None:
                raise error
        return Treated(len(held), len(unscored))

    async def _renew(self, owner: str) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await asyncio.to_thread(self._buffer.renew, owner)
            except BufferUnavailableError as error:
                log.warning("the leases of groups in hand were not renewed: %s", error)

    async def _rescore(self, group_id: str, owner: str, pool: RewardPool) -> bool | None:
        """Whether the group, scored by the live version, is still worth training on; None when it
        is not because checks abstained. Such a one stays as it is, and so does one whose lease was
        lost meanwhile.
        """
        [group] = await asyncio.to_thread(self._buffer.fetch, [group_id])
        _, encoded = await pool.score(wire.encode(group))
        scored = wire.decode(encoded, TrajectoryGroup)
        if not scored.is_trainable or (self._skip_uniform and scored.is_uniform):
            rewards = zip(group.rewards, scored.rewards, strict=True)
            has_abstained = any(old is not None and new is None for old, new in rewards)
            return None if has_abstained else False
        if not await asyncio.to_thread(self._buffer.replace, scored, owner):
            log.warning("%s was re-scored too late: its lease had ended", group_id)
        return True
