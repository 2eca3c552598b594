"""Questions to a run's replay buffer and ledger: what is in it, and what moved a step.

Invariant: a query reads and changes nothing. Counts and payloads come from the run's own Redis
while it trains; the ledger answers afterwards, too. Asked by the admin API.
"""

from collections.abc import Sequence
from contextlib import suppress

import msgspec

from cluster.control import redis_of
from cluster.errors import ConfigError, WireError
from cluster.ledger import Ledger
from cluster.replay_reader import BufferReader
from cluster.replay_records import BufferStats
from cluster.run_dir import RunDir
from cluster.types import StepRecord, Trajectory, TrajectoryGroup, Verdict


class TrajectoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One trajectory without its token arrays."""

    trajectory_id: str
    arm: str
    status: str
    text: str
    num_tokens: int
    policy_versions: list[int]
    reward: float | None
    verdicts: list[Verdict]


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One group as a person reads it."""

    group_id: str
    task_id: str
    prompt: str
    reference: str
    num_hints: int
    reward_versions: dict[str, str]
    created_at: float
    trajectories: list[TrajectoryFacts]


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """What moved the weights at one step. `num_gone` of its groups left the buffer: a durable
    checkpoint holds the step, and only the ledger's line of them is kept. A step whose gradient was
    not finite `is_skipped`: it moved none, and `record.skipped` names the groups that it dropped.
    """

    record: StepRecord
    groups: list[GroupFacts]
    num_gone: int
    is_skipped: bool = False


def stats(run: RunDir) -> BufferStats:
    """Counts of the buffer now; `ConfigError` when the run's Redis does not answer."""
    return BufferReader(redis_of(run), run.buffer_id).stats()


def show(run: RunDir, group_id: str) -> GroupFacts:
    """One group that the buffer holds; `ConfigError` when it does not."""
    found = _groups(run, [group_id])
    if not found:
        raise ConfigError(f"group {group_id[:80]!r} is not in the buffer of {run.name}")
    return found[0]


def why(run: RunDir, step: int) -> Why:
    """The ledger's record of `step`, with those of its groups that the buffer still holds."""
    records = Ledger(run.ledger).records()
    record = next((r for r in records if r.step == step), None)
    if record is None:
        known = f"{records[0].step} to {records[-1].step}" if records else "none"
        raise ConfigError(f"step {step} is not in the ledger of {run.name} (steps there: {known})")
    try:
        groups = _groups(run, record.group_ids)
    except ConfigError:
        groups = []  # the run does not train: its buffer is gone, the ledger is not
    num_gone = len(record.group_ids) - len(groups)
    return Why(record=record, groups=groups, num_gone=num_gone, is_skipped=bool(record.skipped))


def _groups(run: RunDir, group_ids: Sequence[str]) -> list[GroupFacts]:
    """Those of `group_ids` that the buffer holds undamaged."""
    if not group_ids:
        return []
    reader = BufferReader(redis_of(run), run.buffer_id)
    found: list[GroupFacts] = []
    for group_id in group_ids:
        with suppress(WireError):
            if (group := reader.find(group_id)) is not None:
                found.append(_facts(group))
    return found


def _facts(group: TrajectoryGroup) -> GroupFacts:
    return GroupFacts(
        group_id=group.group_id,
        task_id=group.task.task_id,
        prompt="\n".join(message.content for message in group.task.messages),
        reference=group.task.reference,
        num_hints=len(group.task.hints),
        reward_versions=group.reward_versions,
        created_at=group.created_at,
        trajectories=[_trajectory(trajectory) for trajectory in group.trajectories],
    )


def _trajectory(trajectory: Trajectory) -> TrajectoryFacts:
    return TrajectoryFacts(
        trajectory_id=trajectory.trajectory_id,
        arm=trajectory.arm,
        status=str(trajectory.status),
        text=trajectory.text,
        num_tokens=len(trajectory.token_ids),
        policy_versions=sorted({span.policy_version for span in trajectory.version_spans}),
        reward=trajectory.reward,
        verdicts=trajectory.verdicts,
    )
