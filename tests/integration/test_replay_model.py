"""The whole replay buffer against a model that is a few dictionaries, driven by hypothesis."""

import time
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import BufferFullError, StageError
from cluster.redis_client import connect
from cluster.replay_buffer import AddResult, ReplayBuffer
from tests.replay_checker import audit, make_group

CAPACITY = 4
MAX_DELIVERIES = 2
IDS = st.sampled_from([f"g{i}" for i in range(8)])
OWNERS = st.sampled_from(["a", "b"])
STEPS = st.integers(1, 4)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


class Model(RuleBasedStateMachine):
    """`order` holds (-priority, arrival) of every group; `ready` to `gone` are places."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.run_id = uuid.uuid4().hex
        self.client = connect(self.url)
        self.long = self.buffer(lease_s=3600.0)
        self.short = self.buffer(lease_s=0.001)
        self.order: dict[str, tuple[float, int]] = {}
        self.deliveries: dict[str, int] = {}
        self.ready: set[str] = set()
        self.leased: dict[str, tuple[str, bool]] = {}  # owner, is short
        self.consumed: dict[str, int] = {}
        self.gone: dict[str, str] = {}
        self.num_restored = 0

    def teardown(self) -> None:
        self.client.close()

    def buffer(self, lease_s: float) -> ReplayBuffer:
        return ReplayBuffer(
            self.client,
            self.run_id,
            capacity_groups=CAPACITY,
            lease_s=lease_s,
            max_deliveries=MAX_DELIVERIES,
        )

    @rule(group_id=IDS, priority=st.sampled_from([0.0, 0.5, -2.0]))
    def add(self, group_id: str, priority: float) -> None:
        group = make_group(group_id, priority=priority, num_tokens=2)
        if group_id in self.order:
            assert self.long.add(group) is AddResult.DUPLICATE
            return
        num_held = len(self.ready) + len(self.leased)
        self.num_restored = min(self.num_restored, num_held)
        if num_held >= CAPACITY + self.num_restored:
            with pytest.raises(BufferFullError):
                self.long.add(group)
        else:
            assert self.long.add(group) is AddResult.ADDED
            self.order[group_id] = (-priority, len(self.order))
            self.deliveries[group_id] = 0
            self.ready.add(group_id)

    @rule(num=st.integers(0, 3), owner=OWNERS, is_short=st.booleans())
    def claim(self, num: int, owner: str, is_short: bool) -> None:
        expected = sorted(self.ready, key=self.order.__getitem__)[:num]
        for group_id in expected:
            self.ready.remove(group_id)
            self.leased[group_id] = (owner, is_short)
            self.deliveries[group_id] += 1
        buffer = self.short if is_short else self.long
        headers = buffer.claim(num, owner=owner, wait_s=0.0)
        assert [header.group_id for header in headers] == expected

    @rule(owner=OWNERS, group_ids=st.none() | st.lists(IDS, max_size=4, unique=True))
    def renew(self, owner: str, group_ids: list[str] | None) -> None:
        named = self.leased.keys() if group_ids is None else set(group_ids)
        mine = [g for g, (holder, _) in self.leased.items() if holder == owner and g in named]
        assert self.long.renew(owner, group_ids) == len(mine)
        self.leased.update(dict.fromkeys(mine, (owner, False)))

    @rule(group_ids=st.lists(IDS, max_size=4, unique=True), owner=OWNERS)
    def release(self, group_ids: list[str], owner: str) -> None:
        mine = [g for g in group_ids if self.leased.get(g, ("", False))[0] == owner]
        assert self.long.release(group_ids, owner) == len(mine)
        for group_id in mine:
            self.deliveries[group_id] -= 1
            del self.leased[group_id]
            self.ready.add(group_id)

    @rule(group_ids=st.lists(IDS, min_size=1, max_size=3, unique=True), step=STEPS)
    def consume(self, group_ids: list[str], step: int) -> None:
        held = self.ready | self.leased.keys()
        if any(g not in held and self.consumed.get(g) != step for g in group_ids):
            with pytest.raises(StageError):
                self.long.consume(group_ids, step=step)
            return
        self.long.consume(group_ids, step=step)
        for group_id in group_ids:
            self.ready.discard(group_id)
            self.leased.pop(group_id, None)
            self.consumed[group_id] = step
            self.deliveries[group_id] = 0

    @rule(durable_step=STEPS)
    def acknowledge(self, durable_step: int) -> None:
        done = [g for g, step in self.consumed.items() if step <= durable_step]
        assert self.long.acknowledge(durable_step) == len(done)
        for group_id in done:
            del self.consumed[group_id]
            self.gone[group_id] = "acknowledged"

    @rule(durable_step=STEPS)
    def restore(self, durable_step: int) -> None:
        undone = [g for g, step in self.consumed.items() if step > durable_step]
        for group_id in undone:
            del self.consumed[group_id]
            self.ready.add(group_id)
        returned = self.end_leases(list(self.leased))
        assert self.long.restore(durable_step) == len(undone) + returned
        self.num_restored = len(self.ready)

    @rule()
    def expire(self) -> None:
        time.sleep(0.003)
        ended = [g for g, (_, is_short) in self.leased.items() if is_short]
        assert self.long.expire() == self.end_leases(ended)

    def end_leases(self, group_ids: list[str]) -> int:
        """Number of groups that become ready again; the others were delivered too often."""
        returned = 0
        for group_id in group_ids:
            del self.leased[group_id]
            if self.deliveries[group_id] > MAX_DELIVERIES:
                self.gone[group_id] = "dead"
            else:
                self.ready.add(group_id)
                returned += 1
        return returned

    @rule(
        group_id=IDS,
        reason=st.sampled_from(["uniform", "fenced"]),
        owner=st.one_of(st.just(""), OWNERS),
    )
    def drop(self, group_id: str, reason: str, owner: str) -> None:
        held = self.ready | self.leased.keys() | self.consumed.keys()
        if owner and group_id in held and self.leased.get(group_id, ("", False))[0] != owner:
            assert not self.long.drop(group_id, reason, owner)
            return
        if group_id in self.consumed:
            with pytest.raises(StageError):
                self.long.drop(group_id, reason)
            return
        assert self.long.drop(group_id, reason, owner)
        if group_id in self.ready or group_id in self.leased:
            self.ready.discard(group_id)
            self.leased.pop(group_id, None)
            self.gone[group_id] = reason

    @precondition(lambda self: self.ready or self.leased or self.consumed)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        held = sorted(self.ready | self.leased.keys() | self.consumed.keys())
        group_ids = data.draw(st.lists(st.sampled_from(held), max_size=3))
        assert [group.group_id for group in self.long.fetch(group_ids)] == group_ids

    @invariant()
    def books_balance(self) -> None:
        stats = self.long.stats()
        assert stats.added == len(self.order)
        assert stats.ready == len(self.ready)
        assert stats.leased == len(self.leased)
        assert stats.consumed == len(self.consumed)
        ends = list(self.gone.values())
        assert stats.acknowledged == ends.count("acknowledged")
        assert stats.dead_lettered == ends.count("dead")
        for reason in ("uniform", "fenced"):
            assert stats.dropped.get(reason, 0) == ends.count(reason)
        audit(self.client, self.run_id, self.long)


def test_buffer_agrees_with_the_model(url: str) -> None:
    Model.url = url
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
