"""Contract of the replay buffer on a real server: order, leases, steps, accounting."""

import pickle
import threading
import time
import uuid

import pytest
import redis

from cluster.errors import BufferFullError, StageError, WireError
from cluster.replay_buffer import AddResult, ReplayBuffer
from cluster.replay_keys import Keys
from cluster.types import GroupHeader
from tests.replay_checker import audit, claim, fill, make_buffer, make_group


def test_group_comes_back_as_it_was_added(buffer: ReplayBuffer) -> None:
    group = make_group("a", policy_version=3, priority=0.1)
    buffer.add(group)

    assert buffer.claim(1, owner="o", wait_s=0.0) == [GroupHeader.of(group)]
    [fetched] = buffer.fetch(["a"])

    assert fetched.task == group.task
    assert fetched.priority == 0.1
    for got, want in zip(fetched.trajectories, group.trajectories, strict=True):
        assert got.token_ids.tolist() == want.token_ids.tolist()
        assert got.rollout_logprobs.tolist() == want.rollout_logprobs.tolist()
        assert got.loss_mask.tolist() == want.loss_mask.tolist()
        assert got.version_spans == want.version_spans


def test_higher_priority_first_then_first_in_first_out(buffer: ReplayBuffer) -> None:
    for group_id, priority in [("z", 0.0), ("a", 0.0), ("low", -1.5), ("high", 1e-9), ("m", 0.0)]:
        buffer.add(make_group(group_id, priority=priority))

    assert claim(buffer, 2) == ["high", "z"]
    assert claim(buffer) == ["a", "m", "low"]


def test_released_group_keeps_its_place(buffer: ReplayBuffer) -> None:
    fill(buffer, "a", "b", "c")
    assert claim(buffer, 2) == ["a", "b"]

    assert buffer.release(["a", "b", "c", "unknown"], "learner/0") == 2
    assert claim(buffer) == ["a", "b", "c"]


def test_fetch_keeps_the_order_asked_for(buffer: ReplayBuffer) -> None:
    ids = [f"g{i}" for i in range(40)]
    fill(buffer, *ids)

    assert [g.group_id for g in buffer.fetch(ids[::-1])] == ids[::-1]
    assert buffer.fetch([]) == []


@pytest.mark.parametrize("end", ["ready", "leased", "consumed", "acknowledged", "dropped"])
def test_duplicate_is_refused_wherever_the_first_one_is(buffer: ReplayBuffer, end: str) -> None:
    fill(buffer, "a")
    if end == "dropped":
        buffer.drop("a", "uniform")
    if end in ("leased", "consumed", "acknowledged"):
        claim(buffer)
    if end in ("consumed", "acknowledged"):
        buffer.consume(["a"], step=1)
    if end == "acknowledged":
        assert buffer.acknowledge(1) == 1

    assert buffer.add(make_group("a")) is AddResult.DUPLICATE
    assert buffer.stats().duplicates == 1
    assert buffer.stats().added == 1


def test_memory_of_finished_groups_is_bounded_and_of_the_last(
    buffer: ReplayBuffer, client: redis.Redis, run_id: str
) -> None:
    fill(buffer, "old", "new", "newer")
    for group_id in ("old", "new", "newer"):
        buffer.drop(group_id, "x")
        time.sleep(0.002)  # they are told apart by the millisecond
    assert buffer._num_remembered >= 8 * 100
    buffer._num_remembered = 2

    assert buffer.add(make_group("newer")) is AddResult.DUPLICATE
    assert client.zrange(Keys(run_id).finished, 0, -1) == [b"new", b"newer"]
    fill(buffer, "old")


def test_an_undone_group_may_be_added_again(client: redis.Redis, run_id: str) -> None:
    buffer = make_buffer(client, run_id)
    fill(buffer, "undone", "done")
    claim(buffer)
    buffer.consume(["undone", "done"], step=1)
    buffer.acknowledge(1)
    buffer.readmit(["undone", "never seen"])
    assert buffer.add(make_group("undone")) is AddResult.ADDED
    assert buffer.add(make_group("done")) is AddResult.DUPLICATE
    assert buffer.stats().num_unaccounted == 0


def test_full_buffer_pushes_back_until_groups_are_consumed(
    client: redis.Redis, run_id: str
) -> None:
    buffer = make_buffer(client, run_id, capacity=2)
    fill(buffer, "a", "b")
    with pytest.raises(BufferFullError, match=r"below 2 \(buffer.capacity_groups\)"):
        buffer.add(make_group("c"))

    assert buffer.add(make_group("a")) is AddResult.DUPLICATE
    claim(buffer, 1)
    with pytest.raises(BufferFullError):
        buffer.add(make_group("c"))
    buffer.consume(["a"], step=1)
    fill(buffer, "c")
    audit(client, run_id, buffer)


def test_groups_that_a_roll_back_brought_back_leave_room_for_what_it_needs_besides(
    client: redis.Redis, run_id: str
) -> None:
    buffer = make_buffer(client, run_id, capacity=2)
    for step in (1, 2):
        fill(buffer, f"used-{step}", f"also-{step}")
        buffer.consume(claim(buffer), step=step)
    assert buffer.restore(0) == 4
    fill(buffer, "a", "b")
    with pytest.raises(BufferFullError):
        buffer.add(make_group("c"))
    buffer.consume(claim(buffer), step=1)
    fill(buffer, "c", "d")
    with pytest.raises(BufferFullError):
        buffer.add(make_group("e"))
    audit(client, run_id, buffer)


@pytest.mark.parametrize("priority", [float("nan"), float("inf")])
def test_priority_must_be_finite(buffer: ReplayBuffer, priority: float) -> None:
    with pytest.raises(WireError, match="priority of a must be finite"):
        buffer.add(make_group("a", priority=priority))


def test_claim_waits_for_an_add_without_polling(buffer: ReplayBuffer, client: redis.Redis) -> None:
    def num_scripts() -> int:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    before = num_scripts()
    adding = threading.Timer(0.1, fill, args=(buffer, "a"))
    adding.start()
    started = time.monotonic()
    [header] = buffer.claim(1, owner="o", wait_s=20.0)
    waited_s = time.monotonic() - started
    adding.join()

    assert header.group_id == "a"
    assert 0.05 < waited_s < 0.8, "the add must end the wait"
    assert num_scripts() - before <= 4


def test_claim_gives_up_when_its_time_is_over(buffer: ReplayBuffer) -> None:
    started = time.monotonic()
    assert buffer.claim(1, owner="o", wait_s=0.3) == []
    assert 0.25 < time.monotonic() - started < 3.0


def test_each_of_several_waiters_gets_a_group(buffer: ReplayBuffer) -> None:
    claimed: list[str] = []

    def wait_for_one(owner: str) -> None:
        headers = buffer.claim(1, owner=owner, wait_s=20.0)
        claimed.extend(header.group_id for header in headers)

    waiters = [threading.Thread(target=wait_for_one, args=(f"o{i}",)) for i in range(4)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.2)
    fill(buffer, "a", "b", "c", "d")
    for waiter in waiters:
        waiter.join(timeout=20.0)

    assert sorted(claimed) == ["a", "b", "c", "d"]


def test_released_deliveries_do_not_count(buffer: ReplayBuffer) -> None:
    fill(buffer, "a")
    for _ in range(5):
        assert claim(buffer) == ["a"]
        assert buffer.release(["a"], "learner/0") == 1

    claim(buffer)
    assert buffer.restore(0) == 1


def test_acknowledge_deletes_what_durable_steps_consumed(buffer: ReplayBuffer) -> None:
    fill(buffer, "a", "b", "c")
    for step, group_id in enumerate(claim(buffer), start=1):
        buffer.consume([group_id], step=step)
    assert claim(buffer) == []
    assert [g.group_id for g in buffer.fetch(["a", "b", "c"])] == ["a", "b", "c"]

    assert buffer.acknowledge(2) == 2
    assert buffer.acknowledge(2) == 0
    assert buffer.stats().consumed == 1
    with pytest.raises(WireError, match="a: no payload"):
        buffer.fetch(["a"])


def test_restore_undoes_steps_that_no_checkpoint_holds(buffer: ReplayBuffer) -> None:
    fill(buffer, "a", "b", "c", "d")
    claim(buffer, 3)
    buffer.consume(["a"], step=1)
    buffer.consume(["b"], step=2)

    assert buffer.restore(1) == 2
    assert buffer.restore(1) == 0
    assert claim(buffer) == ["b", "c", "d"]
    assert buffer.acknowledge(1) == 1


def test_acknowledge_and_restore_move_more_than_one_batch(client: redis.Redis, run_id: str) -> None:
    buffer = make_buffer(client, run_id, capacity=2000)
    ids = [f"g{i}" for i in range(600)]
    fill(buffer, *ids)
    claim(buffer, 600)
    buffer.consume(ids[:300], step=1)
    buffer.consume(ids[300:], step=2)

    assert buffer.restore(1) == 300
    assert buffer.acknowledge(1) == 300
    assert claim(buffer, 600) == ids[300:]
    audit(client, run_id, buffer)


def test_deliveries_start_anew_once_a_group_was_consumed(buffer: ReplayBuffer) -> None:
    fill(buffer, "a")
    for _ in range(4):
        for _ in range(2):
            claim(buffer)
            assert buffer.restore(0) == 1
        claim(buffer)
        buffer.consume(["a"], step=1)
        assert buffer.restore(0) == 1


def test_consume_is_all_or_nothing(buffer: ReplayBuffer) -> None:
    fill(buffer, "a", "b")
    claim(buffer)
    buffer.consume(["a"], step=1)
    buffer.consume(["a"], step=1)

    with pytest.raises(StageError, match="a is consumed by step 1; x is not in the buffer"):
        buffer.consume(["b", "a", "x"], step=2)
    assert buffer.stats().leased == 1


def test_drop_counts_by_reason_and_once(buffer: ReplayBuffer) -> None:
    fill(buffer, "a", "b", "c")
    assert claim(buffer, 1) == ["a"]
    for group_id, reason in [("a", "uniform"), ("b", "fenced"), ("b", "fenced"), ("x", "fenced")]:
        buffer.drop(group_id, reason)
    assert buffer.stats().dropped == {"uniform": 1, "fenced": 1}

    assert claim(buffer) == ["c"]
    buffer.consume(["c"], step=1)
    with pytest.raises(StageError, match="c must not be dropped"):
        buffer.drop("c", "late")


def test_runs_do_not_see_each_other(buffer: ReplayBuffer, client: redis.Redis) -> None:
    fill(buffer, "a")
    other = make_buffer(client, uuid.uuid4().hex)

    assert claim(other) == []
    fill(other, "a")


def test_nothing_is_pickled(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("dumps", "loads", "dump", "load"):
        monkeypatch.setattr(pickle, name, refuse)
    fill(buffer, "a")
    claim(buffer)
    buffer.fetch(["a"])
    buffer.consume(["a"], step=1)
    assert buffer.acknowledge(1) == 1
