"""Orders of replay on a real server: who goes first, and nobody left out, lost or doubled."""

import random
import threading
import time
from collections import Counter

import msgspec
import pytest
import redis

from actors.curriculum import Curriculum
from actors.intake import WithinAge
from actors.rollout import Sampling
from cluster.config import BufferSection, Config
from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import ConfigError
from cluster.redis_client import connect
from cluster.replay_buffer import AddResult, ReplayBuffer
from cluster.replay_policy import POLICIES, ReplayPolicy, build_policy, policy_of
from cluster.types import GroupHeader, Message, Task, TrajectoryGroup
from tests.replay_checker import audit, claim, make_buffer, make_group

ROWS = [  # group, policy version, rewards; in order of arrival
    ("old-flat", 1, [0.0, 0.1]),
    ("old-steep", 1, [0.0, 1.0]),
    ("new-flat", 3, [0.0, 0.1]),
    ("new-steep", 3, [0.0, 1.0]),
    ("new-even", 3, [1.0, 1.0]),
    ("mid-steep", 2, [None, 0.0, 1.0]),
]
ORDERS = {
    "fifo": [name for name, _, _ in ROWS],
    "freshest": ["new-flat", "new-steep", "new-even", "mid-steep", "old-flat", "old-steep"],
    "prioritised": ["new-steep", "mid-steep", "old-steep", "new-flat", "old-flat", "new-even"],
}


def made(use: str, **settings: object) -> ReplayPolicy:
    return build_policy(BufferSection(policy={"use": use, "settings": settings}))


def scored(
    policy: ReplayPolicy, name: str, version: int, rewards: list[float | None]
) -> TrajectoryGroup:
    """As a reward worker adds it."""
    group = make_group(name, policy_version=version, num_trajectories=len(rewards), num_tokens=2)
    pairs = zip(group.trajectories, rewards, strict=True)
    group = msgspec.structs.replace(
        group, trajectories=[msgspec.structs.replace(t, reward=reward) for t, reward in pairs]
    )
    return msgspec.structs.replace(group, priority=policy.priority(group))


def filled(client: redis.Redis, run_id: str, use: str, lease_s: float = 60.0) -> ReplayBuffer:
    buffer, policy = make_buffer(client, run_id, lease_s=lease_s), made(use)
    for row in ROWS:
        assert buffer.add(scored(policy, *row)) is AddResult.ADDED
    return buffer


def test_the_built_in_policies_are_all_tested() -> None:
    assert ORDERS.keys() == POLICIES.keys()


@pytest.mark.parametrize("use", ORDERS)
def test_order_and_leases(client: redis.Redis, run_id: str, use: str) -> None:
    """Who was given back, or whose lease ran out, has the rank it had before."""
    order = ORDERS[use]
    buffer = filled(client, run_id, use, lease_s=0.05)
    assert [header.group_id for header in buffer.ready()] == order
    assert claim(buffer, 2) == order[:2]
    assert buffer.release(order[:1], "learner/0") == 1
    assert claim(buffer, 1) == order[:1]
    time.sleep(0.1)
    assert buffer.expire() == 2
    assert claim(buffer, 3) == order[:3]
    assert claim(buffer) == order[3:]
    audit(client, run_id, buffer)


def test_age_counts_more_with_a_short_halflife(client: redis.Redis, run_id: str) -> None:
    buffer = make_buffer(client, run_id)
    policy = made("prioritised", halflife=0.25)
    for row in ROWS[:4]:
        buffer.add(scored(policy, *row))
    assert claim(buffer) == ["new-steep", "new-flat", "old-steep", "old-flat"]


def test_a_group_scored_anew_gets_a_new_rank(client: redis.Redis, run_id: str) -> None:
    buffer = filled(client, run_id, "prioritised")
    assert buffer.take(["old-flat"], "admin") == ["old-flat"]
    assert buffer.replace(scored(made("prioritised"), "old-flat", 1, [-20.0, 20.0]), "admin")
    buffer.release(["old-flat"], "admin")
    assert claim(buffer, 2) == ["old-flat", "new-steep"]
    audit(client, run_id, buffer)


@pytest.mark.parametrize("use", ORDERS)
def test_two_learners_lose_nothing_and_use_nothing_twice(
    client: redis.Redis, run_id: str, server: EmbeddedRedis, use: str
) -> None:
    """Beside a producer; they give groups back, let leases run out, and steps are undone."""
    num_groups, policy, rng = 300, made(use), random.Random(use)
    main = make_buffer(client, run_id, capacity=num_groups, lease_s=0.2)
    ledger: dict[int, list[str]] = {}
    disorder: list[list[float]] = []
    is_full = threading.Event()

    def learn(rank: int) -> None:
        mine, chance = make_buffer(connect(server.url), run_id, lease_s=0.2), random.Random(rank)
        owner, step = f"learner/{rank}", rank + 1
        while True:
            headers = mine.claim(chance.randint(1, 8), owner=owner, wait_s=0)
            ranks = [header.priority for header in headers]
            disorder.extend([ranks] if ranks != sorted(ranks, reverse=True) else [])
            if not headers and is_full.is_set() and mine.stats().leased == 0:
                return
            fate = chance.random()
            group_ids = [header.group_id for header in headers]
            if fate < 0.1:
                mine.release(group_ids, owner)
            elif fate < 0.9 and group_ids:
                ledger[step] = group_ids
                mine.consume(group_ids, step=step)
                step += 2
            mine.expire()

    learners = [threading.Thread(target=learn, args=(rank,)) for rank in (0, 1)]
    for learner in learners:
        learner.start()
    for i in range(num_groups):
        rewards: list[float | None] = [0.0, rng.random()]
        main.add(scored(policy, f"g{i}", rng.randint(0, 20), rewards))
    is_full.set()
    for learner in learners:
        learner.join(timeout=30)
        assert not learner.is_alive()
    assert disorder == []
    audit(client, run_id, main)

    durable = max(ledger) // 2
    undone = [g for step, group_ids in ledger.items() if step > durable for g in group_ids]
    assert undone
    assert main.restore(durable) == len(undone)
    again = claim(main, num_groups)
    assert sorted(again) == sorted(undone)
    main.consume(again, step=durable + 1)
    kept = [g for step, group_ids in ledger.items() if step <= durable for g in group_ids]
    stats = main.stats()
    used = Counter([*kept, *again])
    assert max(used.values()) == 1
    assert len(used) + stats.dead_lettered == num_groups
    audit(client, run_id, main)


@pytest.mark.parametrize("use", ORDERS)
def test_under_every_policy_each_group_is_used_in_time(
    client: redis.Redis, run_id: str, use: str
) -> None:
    """A clock drives slots, draws, the buffer and intake; lengths are heavy-tailed; in the middle
    the run goes back to a state two steps ago.
    """
    num_groups, num_steps, max_policy_age, rng = 4, 30, 3, random.Random(use)
    tasks = [
        Task(task_id=f"t{i}", taskset="demo", messages=[Message(role="user", content=str(i))])
        for i in range(500)
    ]
    draws = Curriculum(tasks, 3, Sampling(4, 1.0, [0]), group_size=2)
    policy, buffer = made(use), make_buffer(client, run_id, capacity=500, lease_s=600.0)
    capacity = (max_policy_age + 1) * num_groups
    free, now, version, has_failed = capacity, 0.0, 0, False
    running: dict[str, tuple[float, int]] = {}  # group -> end, version
    used: dict[int, list[str]] = {}
    drawn: list[str] = []
    state = draws.state()
    while version < num_steps:
        intake = WithinAge(draws, num_groups, version - max_policy_age, [])
        while len(intake.claimed) < num_groups:
            for _ in range(free):
                group_id = draws.next(version).group_id
                drawn.append(group_id)
                if not draws.is_held(group_id):
                    running[group_id] = (now + min(12.0, rng.paretovariate(1.2)), version)
            free = 0
            wanted = num_groups - len(intake.claimed)
            headers = buffer.claim(wanted, owner="o", wait_s=0)
            assert all(h.min_policy_version >= version - max_policy_age for h in headers), "too old"
            intake.offer(headers)
            if not headers:
                first = min(running, key=lambda g: running[g][0])
                end, at = running.pop(first)
                now = max(now, end)
                buffer.add(scored(policy, first, at, [0.0, rng.random()]))
        buffer.release([h.group_id for h in intake.waiting], "o")
        version += 1
        used[version] = [h.group_id for h in intake.claimed]
        buffer.consume(used[version], step=version)
        free = draws.settle(used[version])
        now += 2.0
        for group_id in [g for g, (end, _) in running.items() if end <= now]:
            _, at = running.pop(group_id)
            buffer.add(scored(policy, group_id, at, [0.0, rng.random()]))
        if version == 13:
            state = draws.state()
        if version == 15 and not has_failed:
            has_failed, version, free = True, 13, capacity
            del used[14], used[15]
            running.clear()
            buffer.acknowledge(13)
            buffer.restore(13)
            draws.restore(state, buffer.versions())
    flat = [group_id for group_ids in used.values() for group_id in group_ids]
    assert len(flat) == len(set(flat)) == num_groups * num_steps
    assert set(drawn[: num_groups * (num_steps - max_policy_age - 2)]) <= set(flat), "left out"
    audit(client, run_id, buffer)


def test_sync_mode_has_an_order_of_its_own(tiny_config: Config) -> None:
    assert tiny_config.rollout.max_policy_age == 0
    policy_of(tiny_config)
    buffer = tiny_config.buffer.model_copy(update={"policy": {"use": "freshest"}})
    freshest = tiny_config.model_copy(update={"buffer": buffer})
    with pytest.raises(ConfigError, match=r"buffer\.policy: must be fifo .*max_policy_age 0"):
        policy_of(freshest)
    rollout = tiny_config.rollout.model_copy(update={"max_policy_age": 1})
    policy_of(freshest.model_copy(update={"rollout": rollout}))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"use": "fresh"}, r"buffer.policy: 'fresh' is neither .*freshest"),
        ({"name": "fifo"}, r"buffer.policy.use: .*known here: use, settings"),
        ({"use": "prioritised", "settings": {"halflive": 2}}, "did you mean 'halflife'"),
        ({"use": "prioritised", "settings": {"halflife": 0}}, "halflife must be above 0"),
    ],
)
def test_a_policy_that_is_none_is_refused_in_one_line(
    policy: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_policy(BufferSection(policy=policy))
    assert "\n" not in str(caught.value)


def test_headers_carry_the_rank_to_the_intake() -> None:
    group = scored(made("freshest"), "a", 7, [0.0, 1.0])
    assert GroupHeader.of(group).priority == 7.0
