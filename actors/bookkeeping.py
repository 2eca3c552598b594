"""What must survive: step counter, replay buffer position, ledger, and the fate of every group.

Invariant: a group leaves the buffer for good only when a durable checkpoint contains the step
that consumed it (exactly once with respect to the surviving weights), and whoever wrote before
`take_over` can write no more. Owned by the controller; the buffer client is synchronous, so every
call runs in a thread.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from actors.curriculum import Curriculum
from actors.reward_worker import GroupSummary
from cluster import traces
from cluster.checkpoint_store import CheckpointStore
from cluster.config import Config
from cluster.config_file import config_hash
from cluster.errors import ConfigError, HoneError, StageError, WireError
from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.ledger import Ledger
from cluster.redis_client import OUTAGE_S, connect
from cluster.replay_buffer import ReplayBuffer
from cluster.replay_records import DeadLetter
from cluster.run_dir import RunDir
from cluster.run_state import CurriculumState, RunState
from cluster.types import GroupHeader, StepRecord, StepResult, TrajectoryGroup

if TYPE_CHECKING:
    from learners.group import LearnerGroup

NUM_SHOWN_GROUPS, KEEP_ENDED_S = 2, 30 * 24 * 3600.0
TOO_OLD = "too_old"
SKIPPED = "skipped_step"
LOST_WEIGHTS = "lost_weights"
DEAD_LETTER = "dead_letter"
DROPPED_BEFORE = "dropped_before"  # it failed for the run, and came into the buffer all the same
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """Leased groups; the ids of those that were dropped for their age instead; and the buffer's
    dead letters since the last claim.
    """

    headers: list[GroupHeader]
    too_old: list[str]
    dead: list[DeadLetter]


class Bookkeeping:
    """Step and policy version of a run with everything that backs them."""

    def __init__(self, config: Config, run: RunDir, buffer_url: str) -> None:
        self._config = config
        self._run = run
        self._owner = f"{run.name}-{os.getpid()}"
        self.buffer = ReplayBuffer(
            connect(buffer_url, retry_s=OUTAGE_S),
            run.buffer_id,
            capacity_groups=config.buffer.capacity_groups,
            lease_s=config.buffer.lease_s,
            max_deliveries=config.buffer.max_deliveries,
        )
        self.store = CheckpointStore(run.checkpoints, config.run.keep_checkpoints)
        self._ledger = Ledger(run.ledger)
        self._groups = GroupLog(run)
        self._renewed_at = time.monotonic()
        self._last_letter = "0-0"
        self.epoch = -1
        self.step = 0
        self.policy_version = 0

    @property
    def has_checkpoint(self) -> bool:
        """Also a damaged one: the run does not begin a second time."""
        return self.store.has_any()

    async def take_over(self) -> None:
        """Become the one writer of the run; a controller that was presumed dead is fenced off."""
        self.epoch = await asyncio.to_thread(self.buffer.take_over)
        await asyncio.to_thread(self.store.take_over, self.epoch)

    async def let_buffer_expire(self) -> None:
        """The run is done. A Redis of its own goes with its directory; another forgets it later."""
        if self._run.buffer_id == self._run.name:
            return
        try:
            await asyncio.to_thread(self.buffer.let_expire, KEEP_ENDED_S)
        except HoneError as error:
            log.warning("the groups of the ended run stay in Redis: %s", error)

    def close(self) -> None:
        """The run has ended, well or not."""
        self._groups.close()

    async def restore(self, learner: "LearnerGroup", curriculum: Curriculum) -> int:
        """Go back to the newest whole checkpoint; returns how many groups are in the buffer.

        The groups of steps after it are ready again. In `sync` mode those that lost weights sampled
        are not: they are sampled again, so that the run goes on as if it had never stopped. Raises
        `StageError` when there are checkpoints and none is whole.
        """
        latest = await asyncio.to_thread(self.store.latest)
        if latest is None and self.has_checkpoint:
            raise StageError(
                "checkpoint",
                f"every checkpoint in {self._run.checkpoints} is damaged (now *.corrupt), so there "
                "is nothing to go on from: start a new run with --run NEW",
            )
        if latest is None:
            self.step = self.policy_version = 0
            state = self.state(CurriculumState(), {})
        else:
            path, state = latest
            if state.config_hash != config_hash(self._config):
                raise ConfigError(
                    f"{path} was made with another configuration (hash {state.config_hash}, now "
                    f"{config_hash(self._config)}): resume with the run's own config.yaml"
                )
            await learner.load(path)
        self.step, self.policy_version = state.step, state.policy_version
        held = await asyncio.to_thread(self._roll_back)
        curriculum.restore(state.curriculum, held)
        return len(held)

    def _roll_back(self) -> dict[str, int]:
        """Ledger and buffer to the present step; the policy version of each group still held. The
        ledger comes last: it alone knows what a roll-back that is cut short has still to do.
        """
        records = self._ledger.records()
        used = {g for r in records if r.step <= self.step for g in r.group_ids}
        undone = [g for r in records if r.step > self.step for g in (*r.group_ids, *r.skipped)]
        self.buffer.acknowledge(self.step)
        self.buffer.restore(self.step)
        self._correct_buffer(used, undone)
        self._ledger.truncate_after(self.step)
        if self._config.rollout.max_policy_age == 0:
            for group_id in self.buffer.discard_newer(self.policy_version):
                self._groups.dropped(group_id, LOST_WEIGHTS)
        for letter in self._new_dead_letters():
            self._groups.dropped(letter.group_id, DEAD_LETTER, letter.reason)
        held = self.buffer.versions()
        undecided = self._groups.undecided()
        for group_id in sorted(undecided - held.keys() - used):
            self._groups.dropped(group_id, LOST_WEIGHTS, "Redis has lost it")
        for group_id in (*held, *sorted(used - undecided)):  # some lines went with their machine
            self._groups.append(GroupLine(group_id=group_id, fate=Fate.HELD))
        return held

    def _correct_buffer(self, used: set[str], undone: list[str]) -> None:
        """Where it differs from ledger and checkpoint, which decide. A Redis that lost its last
        second still holds groups that have moved the weights: they go. What it has let go of though
        its steps are undone, as those of a damaged checkpoint and of skipped steps, may be sampled
        again.
        """
        held = self.buffer.versions()
        if back := [group_id for group_id in held if group_id in used]:
            self.buffer.consume(back, step=self.step)
            self.buffer.acknowledge(self.step)
        gone = [group_id for group_id in undone if group_id not in held]
        self.buffer.readmit(gone)
        for group_id in gone:
            self._groups.dropped(group_id, LOST_WEIGHTS)

    def state(self, curriculum: CurriculumState, reward_versions: dict[str, str]) -> RunState:
        """What a checkpoint of the present step holds besides tensors."""
        return RunState(
            run_id=self._run.name,
            step=self.step,
            policy_version=self.policy_version,
            config_hash=config_hash(self._config),
            curriculum=curriculum,
            reward_versions=reward_versions,
        )

    async def claim(self, max_groups: int, wait_s: float, held: Sequence[GroupHeader]) -> Claim:
        """Lease up to `max_groups` groups; those past the age bound are dropped and named.

        Waits at most `wait_s`. A group can grow too old while others overtake it, so the bound is
        checked here, at consumption, and not only at admission. Leases of `held` are renewed; one
        that only Redis knows of, as it may after it has lost its last second, ends by itself.
        """
        await self._renew([header.group_id for header in held])
        headers = await asyncio.to_thread(
            self.buffer.claim, max_groups, owner=self._owner, wait_s=wait_s
        )
        bound = self.policy_version - self._config.rollout.max_policy_age
        too_old = [h.group_id for h in headers if h.min_policy_version < bound]
        for group_id in too_old:
            await asyncio.to_thread(self.buffer.drop, group_id, TOO_OLD)
        fresh = [h for h in headers if h.min_policy_version >= bound]
        return Claim(fresh, too_old, await asyncio.to_thread(self._new_dead_letters))

    async def release(self, headers: list[GroupHeader]) -> None:
        """Give leased groups back: their gradients were never applied."""
        await asyncio.to_thread(self.buffer.release, [h.group_id for h in headers], self._owner)

    async def discard(self, group_ids: list[str]) -> None:
        """Take groups out of the buffer that the run has dropped already, with a reason."""
        for group_id in group_ids:
            await asyncio.to_thread(self.buffer.drop, group_id, DROPPED_BEFORE)

    async def commit(self, headers: list[GroupHeader], result: StepResult) -> list[TrajectoryGroup]:
        """Write down what this step consumed; returns a few of the groups to look at.

        A skipped step (its gradient was not finite) moved no weights: its groups are dropped with
        that reason, after its line of the ledger has named them, so that a rollback knows what else
        is to be sampled again.
        """
        skipped: list[str] = []
        if result.policy_version == self.policy_version:
            skipped, headers = [header.group_id for header in headers], []
        self.step, self.policy_version = result.step, result.policy_version
        group_ids = [header.group_id for header in headers]
        await asyncio.to_thread(self.buffer.consume, group_ids, step=result.step)
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
            skipped=skipped,
        )
        await asyncio.to_thread(self._ledger.commit, record)
        for group_id in skipped:
            await asyncio.to_thread(self.buffer.drop, group_id, SKIPPED)
        for group_id in group_ids:
            traces.end(group_id, step=result.step, policy_version=result.policy_version)
        try:
            return await asyncio.to_thread(self._look_at, group_ids[:NUM_SHOWN_GROUPS])
        except WireError as error:  # the step is committed all the same
            log.warning("no samples of step %d: %s", result.step, error)
            return []

    def _look_at(self, group_ids: list[str]) -> list[TrajectoryGroup]:
        """Without putting a damaged one to the dead letters: it has moved the weights."""
        found = [self.buffer.find(group_id) for group_id in group_ids]
        return [group for group in found if group is not None]

    async def depth(self) -> int:
        """Scored groups that wait for the learner."""
        return (await asyncio.to_thread(self.buffer.stats)).ready

    async def places(self) -> dict[str, str]:
        """Every group that the buffer holds: its id -> ready, leased or consumed."""
        return await asyncio.to_thread(self.buffer.places)

    async def is_stored(self, group_id: str) -> bool:
        return await asyncio.to_thread(self.buffer.holds, group_id)

    def note_scored(self, summary: GroupSummary) -> None:
        """Keep the verdicts of a group for `hone replay why`."""
        self._groups.append(
            GroupLine(
                group_id=summary.group_id,
                fate=Fate.SAMPLED,
                task_id=summary.task_id,
                policy_version=summary.min_policy_version,
                rewards=summary.rewards,
                signals=summary.signals,
                reward_versions=summary.reward_versions,
                arms=summary.arms,
                completion_tokens=summary.completion_tokens,
            )
        )

    def note_dropped(self, group_id: str, reason: str, detail: str) -> None:
        self._groups.dropped(group_id, reason, detail)
        traces.end(group_id, dropped=reason)

    def _new_dead_letters(self) -> list[DeadLetter]:
        """Without their payloads, which nobody here reads."""
        letters = [
            msgspec.structs.replace(letter, payload=b"")
            for letter in self.buffer.dead_letters_after(self._last_letter)
        ]
        self._last_letter = letters[-1].id if letters else self._last_letter
        return letters

    async def _renew(self, group_ids: list[str]) -> None:
        now = time.monotonic()
        if now - self._renewed_at > self._config.buffer.lease_s / 4:
            self._renewed_at = now
            await asyncio.to_thread(self.buffer.renew, self._owner, group_ids)
            await asyncio.to_thread(self.buffer.expire)
