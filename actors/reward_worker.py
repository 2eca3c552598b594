"""The reward actor: scores whole groups with the rubric and puts them into the replay buffer.

Invariant: a group enters the buffer once, frozen, with every verdict stamped by its reward
version; an abstained trajectory has no reward rather than a zero. One actor knows one rubric
version for life: another version is another process, with its own imports. Created by
`actors.reward_set` and `actors.reward_candidate`.
"""

import asyncio
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from actors.verifier_pools import PooledSignal
from cluster import log, traces, wire
from cluster.config import BufferSection, VerifierConfig
from cluster.errors import (
    BufferFullError,
    BufferUnavailableError,
    ConfigError,
    StageError,
    boundary,
)
from cluster.redis_client import CALL_S, connect
from cluster.replay_buffer import ReplayBuffer
from cluster.replay_policy import build_policy
from cluster.reward_state import RUBRIC
from cluster.types import Passes, Task, Trajectory, TrajectoryGroup, TrajectoryStatus
from rewards.base import COST, TIMED_OUT
from rewards.golden import golden_check
from rewards.rubric import Rubric
from rewards.self_check import gold_check, junk_probe

BACK_OFF_S = (0.05, 2.0)
UNSOLVED = "unsolved"
MAX_ADDS = 64  # at once, each of which may wait for Redis: as many as the actor takes calls


class GroupSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller learns of a scored group; the tokens stay in the buffer."""

    group_id: str
    task_id: str
    outcome: str  # added, duplicate, uniform, unsolved, unscored, evaluated
    rewards: list[float | None]
    passed: list[bool | None]  # by the first verifier of the config; None where it abstained
    signals: dict[str, list[float | None]]
    reward_versions: dict[str, str]
    completion_tokens: list[int]  # without those that it was begun with
    arms: list[str]
    num_truncated: int
    is_uniform: bool
    min_policy_version: int
    max_latency_s: float
    begun_tokens: list[int] = []
    passes: Passes = Passes()
    latency_s: dict[str, float] = {}  # by signal
    num_timed_out: dict[str, int] = {}  # abstentions because time ran out, by signal
    cost: dict[str, float] = {}  # of its calls, by signal; not of signals that make none


class RubricFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a fresh worker found its rubric to be."""

    pid: int
    hash: str
    signals: dict[str, str]
    full_reward: float


class RewardWorker:
    """One rubric and one connection to the buffer, opened at the first group: Redis may be away
    while a worker starts.

    `label` is the version that the worker must turn out to be; with "" it is a candidate's. Raises
    `ConfigError` when the code on disk is no longer that version.
    """

    def __init__(
        self,
        index: int,
        label: str,
        verifiers: dict[str, VerifierConfig],
        pooled: dict[str, PooledSignal],
        run_id: str,
        buffer_url: str,
        buffer: BufferSection,
        run_dir: str,
        policy_dir: str = "",
    ) -> None:
        log.setup(f"reward-{index}", run_dir)
        self._label = label
        elsewhere = {name: signal.elsewhere() for name, signal in pooled.items()}
        self._rubric = Rubric(verifiers, policy_dir, elsewhere)
        if label and label.partition("-")[2] != self._rubric.version:
            raise ConfigError(
                f"rubric {label}: its code or settings have changed on disk, they are now "
                f"{self._rubric.version}: swap to the new version, or put the old code back"
            )
        self._policy = build_policy(buffer)
        self._run_id = run_id
        self._url = buffer_url
        self._settings = buffer
        self._buffer: ReplayBuffer | None = None
        self._adders = ThreadPoolExecutor(MAX_ADDS, "add")

    async def facts(self) -> RubricFacts:
        return RubricFacts(
            pid=os.getpid(),
            hash=self._rubric.version,
            signals=self._rubric.versions,
            full_reward=self._rubric.full_reward,
        )

    async def self_check(self, tasks: list[Task], has_junk: bool) -> tuple[list[str], list[str]]:
        """(gold answers and golden completions not paid as they must, junk that is paid)."""
        with boundary("self-check"):
            rejected = await gold_check(self._rubric, tasks, len(tasks))
            rejected += await golden_check(self._rubric)
            paid = await junk_probe(self._rubric, tasks) if has_junk else []
            return rejected, [str(finding) for finding in paid]

    async def preview(self, encoded: bytes) -> GroupSummary:
        """Score without keeping, and without a word to the run."""
        return (await self.score(encoded))[0]

    async def score(self, encoded: bytes) -> tuple[GroupSummary, bytes]:
        """Score without keeping (evaluation): the summary and the encoded scored group."""
        with boundary("score"):
            group = await self._score(encoded)
            return summarize(group, "evaluated"), wire.encode(group)

    async def score_and_add(
        self,
        encoded: bytes,
        skip_uniform: bool,
        deadline_s: float,
        epoch: int,
        must_solve: bool = False,
        failed: bytes | None = None,
    ) -> GroupSummary:
        """Score, then add to the buffer unless the group can teach nothing; waits while it is
        full. Raises `FencedError` when the controller of `epoch` has a successor.

        With `must_solve` a group that failed throughout (see `is_failed`) is not added, whatever
        its rewards. With `failed`, an earlier attempt at the same task, both are scored together
        and the group is made of the passes of this one and the failures of that one.
        """
        with boundary("score"):
            group = await self._score(encoded, failed)
            if must_solve and all(is_failed(t) for t in group.trajectories):
                return summarize(group, UNSOLVED)
            if not group.is_trainable:
                return summarize(group, "unscored")
            if skip_uniform and group.is_uniform:
                return summarize(group, "uniform")
            return summarize(group, await self._add(group, deadline_s, epoch))

    async def _score(self, encoded: bytes, failed: bytes | None = None) -> TrajectoryGroup:
        given = wire.decode(encoded, TrajectoryGroup)
        log.set_progress(policy_version=given.min_policy_version)
        label = self._label or self._rubric.version
        with traces.span("score", given.group_id, reward_version=label):
            if failed is None:
                group = await self._rubric.score(given)
            else:
                group = await self._mixed(given, wire.decode(failed, TrajectoryGroup))
        return msgspec.structs.replace(
            group,
            reward_versions={RUBRIC: label, **group.reward_versions},
            priority=self._policy.priority(group),
        )

    async def _mixed(self, given: TrajectoryGroup, failed: TrajectoryGroup) -> TrajectoryGroup:
        """Passes of `given`, then failures of `failed`, by one rubric at one time."""
        both = [*given.trajectories, *failed.trajectories]
        group = await self._rubric.score(msgspec.structs.replace(given, trajectories=both))
        count = len(given.trajectories)
        hinted, plain = group.trajectories[:count], group.trajectories[count:]
        passes = [t for t in hinted if t.passed]
        failures = [t for t in plain if t.passed is False]
        return msgspec.structs.replace(group, trajectories=(passes + failures) or plain)

    async def _add(self, group: TrajectoryGroup, deadline_s: float, epoch: int) -> str:
        loop = asyncio.get_running_loop()
        pause, limit = BACK_OFF_S
        waited = 0.0
        while True:
            try:
                adding = loop.run_in_executor(self._adders, self._added, group, epoch)
                return await adding
            except BufferFullError as error:
                if waited >= deadline_s:
                    raise StageError("score", f"buffer full for {waited:.0f} s: {error}") from error
                await asyncio.sleep(pause)
                waited, pause = waited + pause, min(limit, 2 * pause)

    def _added(self, group: TrajectoryGroup, epoch: int) -> str:
        if self._buffer is None:
            self._buffer = self._open()
        return self._buffer.add(group, epoch=epoch)

    def _open(self) -> ReplayBuffer:
        try:
            client = connect(self._url, retry_s=CALL_S)
        except ConfigError as error:  # the launcher has found it sound
            raise BufferUnavailableError(str(error)) from error
        return ReplayBuffer(
            client,
            self._run_id,
            capacity_groups=self._settings.capacity_groups,
            lease_s=self._settings.lease_s,
            max_deliveries=self._settings.max_deliveries,
        )


def is_failed(trajectory: Trajectory) -> bool:
    """Known not to have passed: by its verdict, or because the program gave it up, as with a hinted
    rollout that leans on its hint. An abstention is no failure.
    """
    return trajectory.status is TrajectoryStatus.ERROR or trajectory.passed is False


def summarize(group: TrajectoryGroup, outcome: str) -> GroupSummary:
    """Counts and scores of a scored group."""
    trajectories = group.trajectories
    cost: dict[str, float] = {}
    for verdict in (v for t in trajectories for v in t.verdicts if COST in v.breakdown):
        cost[verdict.name] = cost.get(verdict.name, 0.0) + verdict.breakdown[COST]
    names = [verdict.name for verdict in trajectories[0].verdicts]
    scores = {name: [t.verdicts[i].score for t in trajectories] for i, name in enumerate(names)}
    return GroupSummary(
        group_id=group.group_id,
        task_id=group.task.task_id,
        outcome=outcome,
        rewards=group.rewards,
        passed=[t.passed for t in trajectories],
        passes=Passes.of(group),
        signals=scores,
        reward_versions=group.reward_versions,
        completion_tokens=[len(t.token_ids) - t.num_begun for t in trajectories],
        begun_tokens=[t.num_begun for t in trajectories],
        arms=[t.arm for t in trajectories],
        num_truncated=sum(t.status is TrajectoryStatus.TRUNCATED for t in trajectories),
        is_uniform=group.is_uniform,
        min_policy_version=group.min_policy_version,
        latency_s={v.name: v.latency_s for v in trajectories[0].verdicts},
        num_timed_out=Counter(
            v.name for t in trajectories for v in t.verdicts if TIMED_OUT in v.breakdown
        ),
        cost=cost,
        max_latency_s=float(np.max([v.latency_s for t in trajectories for v in t.verdicts])),
    )
