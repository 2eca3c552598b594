"""What must survive: step counter, replay buffer position, ledger and checkpoints.

Invariant: a group leaves the buffer for good only when a durable checkpoint contains the step
that consumed it (exactly once with respect to the surviving weights). Owned by the controller;
the buffer client is synchronous, so every call runs in a thread.
"""

import asyncio
import os
import time
from dataclasses import dataclass

from actors.curriculum import Curriculum
from cluster.checkpoint_store import CheckpointStore
from cluster.config import Config
from cluster.config_file import config_hash
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.run_dir import RunDir
from cluster.types import (
    GroupHeader,
    RunState,
    StepRecord,
    StepResult,
    TrajectoryGroup,
)
from learners.group import LearnerGroup

NUM_SHOWN_GROUPS = 2
TOO_OLD = "too_old"
SKIPPED = "skipped_step"


@dataclass(frozen=True)
class Claim:
    """Leased groups, and the ids of those that were dropped for their age instead."""

    headers: list[GroupHeader]
    too_old: list[str]


class Bookkeeping:
    """Step and policy version of a run with everything that backs them."""

    def __init__(self, config: Config, run: RunDir, buffer_url: str) -> None:
        self._config = config
        self._run = run
        self._owner = f"{run.name}-{os.getpid()}"
        self._buffer = ReplayBuffer(
            connect(buffer_url),
            run.name,
            capacity_groups=config.buffer.capacity_groups,
            lease_s=config.buffer.lease_s,
            max_deliveries=config.buffer.max_deliveries,
        )
        self._ledger = Ledger(run.ledger)
        self._store = CheckpointStore(run.checkpoints, config.run.keep_checkpoints)
        self._renewed_at = time.monotonic()
        self.step = 0
        self.policy_version = 0

    async def restore(self, learner: LearnerGroup, curriculum: Curriculum) -> int:
        """Continue from the newest whole checkpoint; returns how many groups came back to the
        buffer.
        """
        latest = await asyncio.to_thread(self._store.latest)
        if latest is None:
            self._ledger.truncate_after(0)
            return await asyncio.to_thread(self._buffer.restore, 0)
        path, state = latest
        if state.config_hash != config_hash(self._config):
            raise ConfigError(
                f"{path} was made with another configuration (hash {state.config_hash}, now "
                f"{config_hash(self._config)}): resume with the run's own config.yaml"
            )
        await learner.load(path)
        curriculum.restore(state.curriculum)
        self.step, self.policy_version = state.step, state.policy_version
        self._ledger.truncate_after(state.step)
        await asyncio.to_thread(self._buffer.acknowledge, state.step)
        return await asyncio.to_thread(self._buffer.restore, state.step)

    async def claim(self, max_groups: int, wait_s: float) -> Claim:
        """Lease up to `max_groups` groups; those past the age bound are dropped and named.

        Waits at most `wait_s`. A group can grow too old while others overtake it, so the bound is
        checked here, at consumption, and not only at admission.
        """
        await self._renew()
        headers = await asyncio.to_thread(
            self._buffer.claim,
            max_groups,
            owner=self._owner,
            min_policy_version=0,
            wait_s=wait_s,
        )
        bound = self.policy_version - self._config.rollout.max_policy_age
        too_old = [h.group_id for h in headers if h.min_policy_version < bound]
        for group_id in too_old:
            await asyncio.to_thread(self._buffer.drop, group_id, TOO_OLD)
        return Claim([h for h in headers if h.min_policy_version >= bound], too_old)

    async def release(self, headers: list[GroupHeader]) -> None:
        """Give leased groups back: their gradients were never applied."""
        await asyncio.to_thread(self._buffer.release, [h.group_id for h in headers], self._owner)

    async def commit(self, headers: list[GroupHeader], result: StepResult) -> list[TrajectoryGroup]:
        """Write down what this step consumed; returns a few of the groups to look at.

        A skipped step (its gradient was not finite) moved no weights: its groups are dropped with
        that reason, and its line of the ledger names none.
        """
        if result.policy_version == self.policy_version:
            for header in headers:
                await asyncio.to_thread(self._buffer.drop, header.group_id, SKIPPED)
            headers = []
        self.step, self.policy_version = result.step, result.policy_version
        group_ids = [header.group_id for header in headers]
        await asyncio.to_thread(self._buffer.consume, group_ids, step=result.step)
        signals = sorted({name for header in headers for name in header.reward_versions})
        record = StepRecord(
            step=result.step,
            policy_version=result.policy_version,
            group_ids=group_ids,
            policy_versions=[header.min_policy_version for header in headers],
            reward_versions={
                name: sorted(
                    {h.reward_versions[name] for h in headers if name in h.reward_versions}
                )
                for name in signals
            },
            num_loss_tokens=sum(header.num_loss_tokens for header in headers),
        )
        await asyncio.to_thread(self._ledger.commit, record)
        return await asyncio.to_thread(self._buffer.fetch, group_ids[:NUM_SHOWN_GROUPS])

    async def depth(self) -> int:
        """Scored groups that wait for the learner."""
        return (await asyncio.to_thread(self._buffer.stats)).ready

    async def save(
        self, learner: LearnerGroup, curriculum: Curriculum, reward_versions: dict[str, str]
    ) -> str:
        """Make the current step durable, then acknowledge what it consumed; returns the directory.

        Does nothing when the step is durable already.
        """
        if self.step in self._store.steps():
            return ""
        target = await asyncio.to_thread(self._store.begin, self.step)
        await learner.save(target)
        state = RunState(
            run_id=self._run.name,
            step=self.step,
            policy_version=self.policy_version,
            config_hash=config_hash(self._config),
            curriculum=curriculum.state(),
            reward_versions=reward_versions,
        )
        path = await asyncio.to_thread(self._store.commit, self.step, state)
        await asyncio.to_thread(self._buffer.acknowledge, self.step)
        return str(path)

    async def _renew(self) -> None:
        now = time.monotonic()
        if now - self._renewed_at > self._config.buffer.lease_s / 4:
            self._renewed_at = now
            await asyncio.to_thread(self._buffer.renew, self._owner)
            await asyncio.to_thread(self._buffer.expire)
