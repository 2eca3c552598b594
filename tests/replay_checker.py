"""What the replay buffer's tests share: small groups, short calls, an audit of all keys."""

import os
import signal

import numpy as np
import redis

from cluster.redis_client import connect
from cluster.replay_buffer import AddResult, ReplayBuffer
from cluster.replay_keys import Keys
from cluster.types import Task, Trajectory, TrajectoryGroup, TrajectoryStatus, VersionSpan


def make_group(
    group_id: str,
    *,
    policy_version: int = 0,
    priority: float = 0.0,
    num_trajectories: int = 2,
    num_tokens: int = 8,
) -> TrajectoryGroup:
    """A group whose token ids differ from one group id to the next."""
    rng = np.random.default_rng(list(group_id.encode()))
    task = Task(task_id=f"task-{group_id}", taskset="tests", messages=[], reference="42")
    return TrajectoryGroup(
        group_id=group_id,
        task=task,
        priority=priority,
        reward_versions={"correct": "v1"},
        trajectories=[
            Trajectory(
                trajectory_id=f"{group_id}/{i}",
                group_id=group_id,
                task_id=task.task_id,
                context_tokens=np.arange(3, dtype=np.int32),
                token_ids=rng.integers(0, 32000, num_tokens, dtype=np.int32),
                loss_mask=np.ones(num_tokens, dtype=bool),
                rollout_logprobs=-rng.random(num_tokens, dtype=np.float32),
                version_spans=[VersionSpan(policy_version, 0, num_tokens)],
                status=TrajectoryStatus.COMPLETED,
                reward=float(i % 2),
            )
            for i in range(num_trajectories)
        ],
    )


def audit(client: redis.Redis, run_id: str, buffer: ReplayBuffer) -> None:
    """Assert that every group is in exactly one place and that all counters agree with the keys."""
    keys = Keys(run_id)
    places = [
        {member[16:] for member in client.zrange(keys.ready, 0, -1)},
        set(client.zrange(keys.leased, 0, -1)),
        set(client.zrange(keys.consumed, 0, -1)),
        set(client.zrange(keys.finished, 0, -1)),
    ]
    assert sum(map(len, places)) == len(set[bytes]().union(*places)), "a group is in two places"
    ready, leased, consumed, finished = places
    held = ready | leased | consumed
    for store in (keys.entries, keys.headers, keys.payloads):
        assert set(client.hkeys(store)) == held, store

    stats = buffer.stats()
    assert stats.num_unaccounted == 0
    assert (stats.ready, stats.leased, stats.consumed) == (len(ready), len(leased), len(consumed))
    gone = stats.acknowledged + sum(stats.dropped.values()) + stats.dead_lettered
    assert min(gone, buffer._num_remembered) <= len(finished) <= gone
    assert stats.dead_lettered == client.xlen(keys.dead)
    assert stats.payload_bytes == sum(map(len, client.hvals(keys.payloads)))
    assert client.llen(keys.wake) <= 1


def make_buffer(
    client: redis.Redis, run_id: str, *, capacity: int = 100, lease_s: float = 60.0
) -> ReplayBuffer:
    return ReplayBuffer(client, run_id, capacity_groups=capacity, lease_s=lease_s, max_deliveries=2)


def claim(buffer: ReplayBuffer, num: int = 100, owner: str = "learner/0") -> list[str]:
    headers = buffer.claim(num, owner=owner, wait_s=0.0)
    return [header.group_id for header in headers]


def fill(buffer: ReplayBuffer, *group_ids: str) -> None:
    for group_id in group_ids:
        assert buffer.add(make_group(group_id)) is AddResult.ADDED


def learn(url: str, run_id: str, rank: int) -> list[str]:
    """Body of a learner process: claim, read and consume until nothing comes for 5 s."""
    buffer = make_buffer(connect(url), run_id)
    learned: list[str] = []
    while True:
        headers = buffer.claim(16, owner=f"learner/{rank}", wait_s=5.0)
        if not headers:
            return learned
        groups = buffer.fetch([header.group_id for header in headers])
        buffer.consume([group.group_id for group in groups], step=len(learned) + 1)
        learned += [group.group_id for group in groups]


def claim_and_die(url: str, run_id: str, num: int, lease_s: float) -> None:
    """Body of a learner process that is killed while it holds leases."""
    claim(make_buffer(connect(url), run_id, lease_s=lease_s), num, owner="doomed")
    os.kill(os.getpid(), signal.SIGKILL)
