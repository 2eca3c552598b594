"""How fast the replay buffer takes and gives groups of 8 trajectories x 512 tokens.

Runs against an embedded server with its usual durability (AOF, fsync every second), one client, one
thread. Run with `python -m benchmarks.replay_buffer [NUM_GROUPS]`, or call `measure`.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from cluster import wire
from cluster.embedded_redis import EmbeddedRedis
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.types import (
    Message,
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    Verdict,
    VersionSpan,
)

NUM_TRAJECTORIES = 8
NUM_TOKENS = 512
NUM_CONTEXT_TOKENS = 64
GROUPS_PER_STEP = 16


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of one call, in seconds, and the throughput of all calls together."""

    p50_s: float
    p99_s: float
    groups_per_s: float
    mb_per_s: float


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """`add` is per group; `claim_fetch` and `consume_acknowledge` per step of 16 groups."""

    num_groups: int
    group_bytes: int
    add: Latency
    claim_fetch: Latency
    consume_acknowledge: Latency


def measure(num_groups: int) -> Measurement:
    """Add `num_groups` groups, then learn from all of them in steps of 16; takes about a second
    per thousand groups on one core.
    """
    groups = [_group(i) for i in range(num_groups)]
    group_bytes = len(wire.encode(groups[0]))
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        buffer = ReplayBuffer(
            connect(server.url),
            "benchmark",
            capacity_groups=num_groups,
            lease_s=600.0,
            max_deliveries=3,
        )
        add_s = [_timed(lambda group=group: buffer.add(group)) for group in groups]
        claim_s: list[float] = []
        consume_s: list[float] = []
        for step in range(1, -(-num_groups // GROUPS_PER_STEP) + 1):
            group_ids: list[str] = []
            claim_s.append(_timed(lambda ids=group_ids: ids.extend(_claim_fetch(buffer))))
            consume_s.append(_timed(lambda ids=group_ids, s=step: _finish(buffer, ids, s)))
        left = buffer.stats()
        if left.acknowledged != num_groups or left.num_unaccounted:
            raise AssertionError(f"{num_groups} groups must be acknowledged, got {left}")
    return Measurement(
        num_groups=num_groups,
        group_bytes=group_bytes,
        add=_latency(add_s, num_groups, group_bytes),
        claim_fetch=_latency(claim_s, num_groups, group_bytes),
        consume_acknowledge=_latency(consume_s, num_groups, group_bytes),
    )


def _claim_fetch(buffer: ReplayBuffer) -> list[str]:
    headers = buffer.claim(GROUPS_PER_STEP, owner="learner", wait_s=5.0)
    return [group.group_id for group in buffer.fetch([header.group_id for header in headers])]


def _finish(buffer: ReplayBuffer, group_ids: list[str], step: int) -> None:
    buffer.consume(group_ids, step=step)
    buffer.acknowledge(step)


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _latency(calls_s: list[float], num_groups: int, group_bytes: int) -> Latency:
    total_s = sum(calls_s)
    return Latency(
        p50_s=float(np.percentile(calls_s, 50)),
        p99_s=float(np.percentile(calls_s, 99)),
        groups_per_s=num_groups / total_s,
        mb_per_s=num_groups * group_bytes / total_s / 1e6,
    )


def _group(index: int) -> TrajectoryGroup:
    rng = np.random.default_rng(index)
    group_id = f"group-{index}"
    task = Task(
        task_id=f"task-{index}",
        taskset="benchmark",
        messages=[Message(role="user", content="What is 6 times 7?")],
        reference="42",
    )
    return TrajectoryGroup(
        group_id=group_id,
        task=task,
        reward_versions={"correct": "v1"},
        trajectories=[
            Trajectory(
                trajectory_id=f"{group_id}/{i}",
                group_id=group_id,
                task_id=task.task_id,
                context_tokens=rng.integers(0, 150_000, NUM_CONTEXT_TOKENS, dtype=np.int32),
                token_ids=rng.integers(0, 150_000, NUM_TOKENS, dtype=np.int32),
                loss_mask=np.ones(NUM_TOKENS, dtype=bool),
                rollout_logprobs=-rng.random(NUM_TOKENS, dtype=np.float32),
                version_spans=[VersionSpan(0, 0, NUM_TOKENS)],
                status=TrajectoryStatus.COMPLETED,
                text="x" * (4 * NUM_TOKENS),
                verdicts=[Verdict(score=1.0, name="correct", reward_version="v1")],
                reward=float(i % 2),
            )
            for i in range(NUM_TRAJECTORIES)
        ],
    )


def main() -> None:
    result = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
    print(f"{result.num_groups} groups of {result.group_bytes / 1e3:.1f} kB")
    for name, row in [
        ("add, one group a call", result.add),
        (f"claim + fetch, {GROUPS_PER_STEP} groups a call", result.claim_fetch),
        (f"consume + acknowledge (frees), {GROUPS_PER_STEP}", result.consume_acknowledge),
    ]:
        print(
            f"{name:<36} {row.groups_per_s:8.0f} groups/s {row.mb_per_s:8.1f} MB/s "
            f"p50 {row.p50_s * 1e3:6.2f} ms  p99 {row.p99_s * 1e3:6.2f} ms"
        )


if __name__ == "__main__":
    main()
