"""How fast the replay buffer takes and gives groups of 8 trajectories.

Runs against an embedded server with its usual durability (AOF, fsync every second): producers are
threads with a connection each, in several processes, and one learner claims while they add. Run
with `python -m benchmarks.replay_buffer [NUM_GROUPS]`, or call `measure`.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import psutil

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
NUM_PROCESSES, NUM_THREADS = 4, 25
NUM_PRODUCERS = NUM_PROCESSES * NUM_THREADS
NUM_GROUPS, QUICK_GROUPS = 12_000, 1000  # the long ones take 700 MB in producers
GROUPS_PER_S, MB_PER_S = 3000, 200
START_S, LEARN_S, POLL_S = 60.0, 300.0, 0.005

_start: list[Barrier] = []  # of a producer process


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of one call, in seconds, and the throughput of all calls together."""

    p50_s: float
    p99_s: float
    groups_per_s: float
    mb_per_s: float


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """`add` is per group; `claim_fetch` and `consume_acknowledge` per step of 16 groups, the former
    of the `num_claims` that were made while producers still added. CPU in seconds per second: of
    the producers while they add, of Redis until the last group is acknowledged, to which
    `learned_per_s` counts: a learner that falls behind shows there.
    """

    num_groups: int
    group_bytes: int
    add: Latency
    claim_fetch: Latency
    num_claims: int
    consume_acknowledge: Latency
    learned_per_s: float
    producer_cpus: float
    redis_cpus: float


class Produced(NamedTuple):
    """What one process has added: seconds of each call, of its CPU, and by the clock that all
    processes share.
    """

    add_s: list[float]
    cpu_s: float
    began: float
    ended: float


class Step(NamedTuple):
    """One step of the learner: when it claimed, and the seconds of its two halves."""

    num_groups: int
    began: float
    claim_fetch_s: float
    consume_acknowledge_s: float


def rows(quick: bool) -> Iterator[Row]:
    """At both lengths: groups/s of short ones, MB/s of long ones."""
    num_groups = QUICK_GROUPS if quick else NUM_GROUPS
    note = f" (QUICK: {num_groups} groups)" if quick else ""
    short, long = (measure(num_groups, length) for length in (SHORT, LONG))
    yield judged(
        f"replay buffer, AOF everysec: groups of {short.group_bytes / 1e3:.0f} kB{note}",
        _tail(short),
        f"{GROUPS_PER_S:,} groups/s",
        short.add.groups_per_s >= GROUPS_PER_S,
    )
    yield judged(
        f"replay buffer, AOF everysec: groups of {NUM_TRAJECTORIES * LONG:,} tokens{note}",
        f"{long.add.mb_per_s:.0f} MB/s added: {_tail(long)}",
        f"{MB_PER_S} MB/s",
        long.add.mb_per_s >= MB_PER_S,
    )


def _tail(found: Measurement) -> str:
    return (
        f"{found.add.groups_per_s:,.0f} groups/s added, {found.learned_per_s:,.0f} groups/s "
        f"learned from; p99 {found.add.p99_s * 1e3:.1f} ms to add one by {NUM_PRODUCERS} producers "
        f"in {NUM_PROCESSES} processes, {found.claim_fetch.p99_s * 1e3:.1f} ms to claim and fetch "
        f"{GROUPS_PER_STEP} beside them ({found.num_claims} claims); CPU seconds per second: Redis "
        f"{found.redis_cpus:.2f}, producers {found.producer_cpus:.2f}"
    )


def measure(num_groups: int, num_tokens: int = LONG) -> Measurement:
    """Add `num_groups` groups and learn from all of them in steps of 16 meanwhile; takes seconds
    to start the producers, then a few per thousand groups.
    """
    group_bytes = len(wire.encode(_group(0, num_tokens)))
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(NUM_PROCESSES + 1)
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(Path(folder) / "redis") as server,
        ProcessPoolExecutor(NUM_PROCESSES, spawn, _meet_at, (barrier,)) as pool,
    ):
        buffer, redis = _buffer(server.url, num_groups), psutil.Process(server.pid)
        shares = [range(first, num_groups, NUM_PROCESSES) for first in range(NUM_PROCESSES)]
        producing = [
            pool.submit(_produce, server.url, num_groups, share, num_tokens) for share in shares
        ]
        barrier.wait(START_S)
        began, redis_s = time.monotonic(), _cpu_s(redis)
        steps = _learn(buffer, num_groups, producing)
        learned_s, redis_s = time.monotonic() - began, _cpu_s(redis) - redis_s
        produced = [process.result() for process in producing]
        left = buffer.stats()
        if left.acknowledged != num_groups or left.num_unaccounted:
            raise AssertionError(f"{num_groups} groups must be acknowledged, got {left}")
    ended = max(process.ended for process in produced)
    adding_s = ended - min(process.began for process in produced)
    beside = [step for step in steps if step.began < ended]
    if not beside:
        raise AssertionError(f"{num_groups} groups were added before the first claim: take more")
    consume_s = [step.consume_acknowledge_s for step in steps]
    claim_s = [step.claim_fetch_s for step in beside]
    num_claimed = sum(step.num_groups for step in beside)
    add_s = [seconds for process in produced for seconds in process.add_s]
    return Measurement(
        num_groups=num_groups,
        group_bytes=group_bytes,
        add=_latency(add_s, adding_s, num_groups, group_bytes),
        claim_fetch=_latency(claim_s, sum(claim_s), num_claimed, group_bytes),
        num_claims=len(beside),
        consume_acknowledge=_latency(consume_s, sum(consume_s), num_groups, group_bytes),
        learned_per_s=num_groups / learned_s,
        producer_cpus=sum(process.cpu_s for process in produced) / adding_s,
        redis_cpus=redis_s / learned_s,
    )


def _buffer(url: str, capacity_groups: int) -> ReplayBuffer:
    client = connect(url)
    return ReplayBuffer(
        client, "benchmark", capacity_groups=capacity_groups, lease_s=600.0, max_deliveries=3
    )


def _meet_at(barrier: Barrier) -> None:
    _start.append(barrier)


def _produce(url: str, capacity_groups: int, indices: range, num_tokens: int) -> Produced:
    """Body of a producer process, whose groups are made before the common start."""
    buffer = _buffer(url, capacity_groups)
    groups = [_group(i, num_tokens) for i in indices]
    _start[0].wait(START_S)
    began, cpu_s = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        add_s = list(threads.map(lambda group: _timed(lambda: buffer.add(group)), groups))
    return Produced(add_s, time.process_time() - cpu_s, began, time.monotonic())


def _learn(
    buffer: ReplayBuffer, num_groups: int, producing: Sequence[Future[Produced]]
) -> list[Step]:
    """All groups in steps of 16. Waiting for a step's groups is not timed: it is the producers'."""
    steps: list[Step] = []
    num_left = num_groups
    deadline = time.monotonic() + LEARN_S
    while num_left > 0:
        if buffer.stats().ready < min(GROUPS_PER_STEP, num_left):
            for process in producing:
                if process.done():
                    process.result()  # or why it has failed
            if time.monotonic() > deadline:
                raise TimeoutError(f"{num_left} of {num_groups} groups in {LEARN_S:g} s")
            time.sleep(POLL_S)
            continue
        began = time.monotonic()
        group_ids: list[str] = []
        claim_s = _timed(lambda ids=group_ids: ids.extend(_claim_fetch(buffer)))
        number = len(steps) + 1
        consume_s = _timed(lambda ids=group_ids, step=number: _finish(buffer, ids, step))
        steps.append(Step(len(group_ids), began, claim_s, consume_s))
        num_left -= len(group_ids)
    return steps


def _cpu_s(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


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
    print(f"{result.num_groups} groups of {result.group_bytes / 1e3:.1f} kB; {_tail(result)}")
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
