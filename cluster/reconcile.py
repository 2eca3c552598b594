"""Do ledger, buffer, checkpoint and book of groups of a run agree? The check behind "exactly once".

Invariant: in a sound run each group that was sampled is used by exactly one step of the ledger, or
dropped with a reason, or waits in the buffer; and the newest checkpoint has the policy version that
the ledger gives its step. Reads only. Called by `hone replay stats`, the chaos test and
`make show AREA=durability`.
"""

from collections import Counter
from collections.abc import Iterable

import msgspec

from cluster.checkpoint_store import CheckpointStore
from cluster.group_log import Fate, GroupLog
from cluster.ledger import Ledger
from cluster.replay_reader import BufferReader
from cluster.replay_records import BufferStats
from cluster.run_dir import RunDir

MAX_NAMED = 5


class Reconciliation(msgspec.Struct, frozen=True, kw_only=True):
    """Groups by fate, and what is wrong, one line each; sound means no line."""

    num_sampled: int
    num_used: int
    num_waiting: int
    dropped: dict[str, int]  # groups that were dropped for good, by reason
    steps: int
    policy_version: int
    faults: list[str]

    @property
    def is_sound(self) -> bool:
        return not self.faults


def reconcile(run: RunDir, buffer: BufferReader) -> Reconciliation:
    """Compare everything that `run` wrote with what its buffer holds now.

    Exact for a run that stands still; of one that trains, groups on their way may be missing.
    """
    places, stats = buffer.places(), buffer.stats()
    records = Ledger(run.ledger).records()
    used = Counter(group_id for record in records for group_id in record.group_ids)
    lines = GroupLog(run).read()
    sampled = {line.group_id for line in lines if line.fate is not Fate.DROPPED} | set(places)
    last = {line.group_id: line for line in lines}
    dropped = {
        group_id: line.reason
        for group_id, line in last.items()
        if line.fate is Fate.DROPPED and group_id not in used and group_id not in places
    }
    waiting = {group_id for group_id, place in places.items() if place != "consumed"}
    last_version = records[-1].policy_version if records else 0
    in_use = {group_id for group_id, place in places.items() if place == "consumed"}
    accounted = used.keys() | waiting | dropped.keys() | in_use
    faults = [
        *_named("used by two steps", [g for g, count in used.items() if count > 1]),
        *_named("used, but never sampled", used.keys() - sampled),
        *_named("used, but waiting in the buffer", used.keys() & waiting),
        *_named("not used, not waiting, not dropped", sampled - accounted),
        *_named("consumed, but in no step (a resume takes them back)", in_use - used.keys()),
        *_named("dropped without a reason", [g for g, reason in dropped.items() if not reason]),
        *_buffer_faults(stats),
        *_version_faults(run, {r.step: r.policy_version for r in records}),
    ]
    return Reconciliation(
        num_sampled=len(sampled | dropped.keys()),
        num_used=len(used),
        num_waiting=len(waiting),
        dropped=dict(Counter(dropped.values())),
        steps=records[-1].step if records else 0,
        policy_version=last_version,
        faults=faults,
    )


def _named(what: str, group_ids: Iterable[str]) -> list[str]:
    names = sorted(group_ids)
    shown = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return [f"{len(names)} groups {what}: {shown}"] if names else []


def _buffer_faults(stats: BufferStats) -> list[str]:
    missing = stats.num_unaccounted
    return [f"{missing} groups were added to the buffer and are nowhere"] if missing else []


def _version_faults(run: RunDir, versions: dict[int, int]) -> list[str]:
    """Checkpoints whose policy version is not the ledger's at that step."""
    return [
        f"{path.name} holds policy version {state.policy_version}, the ledger says "
        f"{versions.get(state.step, 0)}"
        for path, state in CheckpointStore(run.checkpoints, keep=1).states()
        if state.policy_version != versions.get(state.step, 0)
    ]
