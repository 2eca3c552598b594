"""Seconds of a run's steps, from one weight sync to the next, and what its learner waited.

Invariant: no step counts that began while Hone imported a rollout worker to stand by, about the
first minute of a run: that is a start, though training goes on beside it. Used by the throughput
harness and by the time to the same accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from cluster.errors import StageError
from cluster.run_dir import RunDir


@dataclass(frozen=True)
class Turn:
    """Steps of one run: seconds of each, mean tokens of a completion, share the learner waits as
    the controller sees it, and as its ranks do where they say so; median seconds of a weight sync
    in which engines stand still, and of its probe.
    """

    step_s: Sequence[float]
    tokens: float
    waits: float
    pause_s: float
    probe_s: float
    ranks_idle: float | None = None

    @property
    def mean_step_s(self) -> float:
        return fmean(self.step_s)


def sync_times(run: RunDir) -> dict[int, float]:
    """When engines held which policy version."""
    return {
        int(str(event.fields["policy_version"])): event.time
        for event in run.read_events()
        if event.kind == "sync"
    }


def num_beside_standby(run: RunDir) -> int:
    """First steps that began while a worker was being prepared (until event `standby_ready`, or
    `standby_ended` where there was no room for it): 0 where none was, all where neither came.
    """
    events = run.read_events()
    over = ("standby_ready", "standby_ended")
    ready = [event.time for event in events if event.kind in over]
    synced_at = sync_times(run)
    if not synced_at or not any(event.kind.startswith("standby_") for event in events):
        return 0
    if not ready:
        return max(synced_at)
    after = [version for version, when in synced_at.items() if when >= ready[0]]
    return min(after, default=max(synced_at))


def turn_of(run: RunDir, num_first: int) -> Turn:
    """Steps after the first `num_first`, and after those beside which a worker was prepared, from
    sync to sync; a row with an evaluation says nothing of what the learner waits for.

    Raises `StageError` where fewer than half of the steps after `num_first` are left.
    """
    synced_at = sync_times(run)
    num_asked = sum(version > num_first for version in synced_at)
    num_first = max(num_first, num_beside_standby(run))
    versions = sorted(version for version in synced_at if version >= num_first)
    if 2 * (len(versions) - 1) < num_asked:
        raise StageError(
            "throughput",
            f"{run.name}: a worker was prepared to stand by until step {num_first}, which leaves "
            f"{len(versions) - 1} of {num_asked} steps to count: half of them must be left",
        )
    later = [row for row in run.read_metrics() if row["step"] > num_first]
    rows = [row for row in later if "eval/pass@1" not in row]
    busy = [share for row in rows if (share := row.get("learner/compute_fraction")) is not None]
    return Turn(
        step_s=[synced_at[after] - synced_at[before] for before, after in pairwise(versions)],
        tokens=fmean(
            row["rollout/completion_tokens_mean"]
            for row in rows
            if "rollout/completion_tokens_mean" in row
        ),
        waits=fmean(1.0 - row["learner/busy_fraction"] for row in rows),
        pause_s=median(row["sync/pause_s"] for row in rows),
        probe_s=median(row["sync/probe_s"] for row in rows),
        ranks_idle=1.0 - fmean(busy) if busy else None,
    )
