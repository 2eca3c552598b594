"""How fast the replay buffer takes and gives groups of 8 trajectories.

Runs against an embedded server with its usual durability (AOF, fsync every second): producers are
threads of this process, one learner claims afterwards. Run with `python -m benchmarks.replay_buffer
[NUM_GROUPS]`, or call `measure`.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.show import Row, judged
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
SHORT, LONG = 160, 512  # tokens of a trajectory: groups of 20 kB, and of 4,096 tokens
NUM_CONTEXT_TOKENS = 64
GROUPS_PER_STEP = 16
NUM_PRODUCERS = 4
NUM_GROUPS, QUICK_GROUPS = 4000, 1000
GROUPS_PER_S, MB_PER_S = 3000, 200


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


def rows(quick: bool) -> Iterator[Row]:
    """At both lengths: groups/s of short ones, MB/s of long ones."""
    num_groups = QUICK_GROUPS if quick else NUM_GROUPS
    note = f" (QUICK: {num_groups} groups)" if quick else ""
    short, long = (measure(num_groups, length, NUM_PRODUCERS) for length in (SHORT, LONG))
    yield judged(
        f"replay buffer, AOF everysec: groups of {short.group_bytes / 1e3:.0f} kB{note}",
        f"{short.add.groups_per_s:,.0f} groups/s added; {_tail(short)}",
        f"{GROUPS_PER_S:,} groups/s",
        short.add.groups_per_s >= GROUPS_PER_S,
    )
    yield judged(
        f"replay buffer, AOF everysec: groups of {NUM_TRAJECTORIES * LONG:,} tokens{note}",
        f"{long.add.mb_per_s:.0f} MB/s added; {_tail(long)}",
        f"{MB_PER_S} MB/s",
        long.add.mb_per_s >= MB_PER_S,
    )


def _tail(found: Measurement) -> str:
    return (
        f"p99 {found.add.p99_s * 1e3:.1f} ms to add one by {NUM_PRODUCERS} producers, "
        f"{found.claim_fetch.p99_s * 1e3:.1f} ms to claim and fetch {GROUPS_PER_STEP}"
    )


def measure(num_groups: int, num_tokens: int = LONG, num_producers: int = 1) -> Measurement:
    """Add `num_groups` groups, then learn from all of them in steps of 16; takes about a second
    per thousand groups on one core.
    """
    groups = [_group(i, num_tokens) for i in range(num_groups)]
    group_bytes = len(wire.encode(groups[0]))
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        buffer = ReplayBuffer(
            connect(server.url),
            "benchmark",
            capacity_groups=num_groups,
            lease_s=600.0,
            max_deliveries=3,
        )
        with ThreadPoolExecutor(num_producers) as producers:
            began = time.perf_counter()
            add_s = list(producers.map(lambda group: _timed(lambda: buffer.add(group)), groups))
            adding_s = time.perf_counter() - began
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
        add=_latency(add_s, adding_s, num_groups, group_bytes),
        claim_fetch=_latency(claim_s, sum(claim_s), num_groups, group_bytes),
        consume_acknowledge=_latency(consume_s, sum(consume_s), num_groups, group_bytes),
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


def _latency(calls_s: list[float], total_s: float, num_groups: int, group_bytes: int) -> Latency:
    return Latency(
        p50_s=float(np.percentile(calls_s, 50)),
        p99_s=float(np.percentile(calls_s, 99)),
        groups_per_s=num_groups / total_s,
        mb_per_s=num_groups * group_bytes / total_s / 1e6,
    )


def _group(index: int, num_tokens: int) -> TrajectoryGroup:
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
                token_ids=rng.integers(0, 150_000, num_tokens, dtype=np.int32),
                loss_mask=np.ones(num_tokens, dtype=bool),
                rollout_logprobs=-rng.random(num_tokens, dtype=np.float32),
                version_spans=[VersionSpan(0, 0, num_tokens)],
                status=TrajectoryStatus.COMPLETED,
                text="x" * (4 * num_tokens),
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
