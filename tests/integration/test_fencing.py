"""A controller that was presumed dead: whatever it still does, its successor's state stays."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.checkpoint_store import CheckpointStore
from cluster.errors import FencedError, StageError
from cluster.ledger import Ledger
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.replay_keys import Keys
from cluster.run_state import RunState
from cluster.types import StepRecord
from tests.replay_checker import audit, claim, fill, make_buffer, make_group


@pytest.fixture
def buffers(
    redis_url: str, request: pytest.FixtureRequest
) -> tuple[ReplayBuffer, ReplayBuffer, str]:
    """An old writer that holds a lease on `a`, and its successor."""
    run_id = f"fence-{request.node.name}".replace("[", "-").replace("]", "")
    old, new = (make_buffer(connect(redis_url), run_id) for _ in range(2))
    old.take_over()
    fill(old, "a", "b")
    assert claim(old, 1, owner="old") == ["a"]
    new.take_over()
    return old, new, run_id


WRITES: dict[str, Callable[[ReplayBuffer], object]] = {
    "add": lambda old: old.add(make_group("late")),
    "claim": lambda old: claim(old, 1, owner="old"),
    "renew": lambda old: old.renew("old"),
    "release": lambda old: old.release(["a"], "old"),
    "consume": lambda old: old.consume(["a"], step=1),
    "acknowledge": lambda old: old.acknowledge(9),
    "restore": lambda old: old.restore(0),
    "expire": lambda old: old.expire(),
    "readmit": lambda old: old.readmit(["a"]),
    "drop": lambda old: old.drop("b", "late"),
    "discard": lambda old: old.discard_newer(-1),
    "take_over": lambda old: old.take_over(),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_write_of_a_presumed_dead_controller_is_refused(
    buffers: tuple[ReplayBuffer, ReplayBuffer, str], redis_url: str, name: str
) -> None:
    old, new, run_id = buffers
    before = new.stats(), new.places()
    with pytest.raises(FencedError, match="newer controller"):
        WRITES[name](old)
    assert (new.stats(), new.places()) == before
    new.consume(["a"], step=1)
    audit(connect(redis_url), run_id, new)


def test_a_reward_worker_that_adds_for_the_old_controller_is_refused(
    buffers: tuple[ReplayBuffer, ReplayBuffer, str],
) -> None:
    old, new, _ = buffers
    worker_epoch = new.epoch
    assert worker_epoch > old.epoch
    with pytest.raises(FencedError):
        new.add(make_group("asked-for-by-the-old"), epoch=old.epoch)
    new.add(make_group("asked-for-by-the-new"), epoch=worker_epoch)
    assert set(new.places()) == {"a", "b", "asked-for-by-the-new"}


def test_groups_of_lost_weights_can_be_made_again(redis_url: str) -> None:
    buffer = make_buffer(connect(redis_url), "fence-lost")
    buffer.add(make_group("kept", policy_version=3))
    buffer.add(make_group("lost", policy_version=4))
    assert buffer.discard_newer(3) == ["lost"]
    assert buffer.stats().dropped == {"lost_weights": 1}
    assert buffer.add(make_group("lost", policy_version=3)) == "added"
    assert buffer.stats().num_unaccounted == 0


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step, policy_version=step, group_ids=[f"g{step}"], policy_versions=[0],
        reward_versions={}, num_loss_tokens=1,
    )  # fmt: skip


def test_what_the_old_controller_still_appends_to_the_ledger_goes_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    old = Ledger(path)
    old.truncate_after(0)
    for step in (1, 2, 3):
        old.commit(record(step))
    new = Ledger(path)
    assert [r.step for r in new.truncate_after(2)] == [3]
    old.commit(record(4))  # it was in the middle of a step
    new.commit(record(3))
    old.commit(record(5))
    assert [r.step for r in Ledger(path).records()] == [1, 2, 3]


def test_the_old_controller_cannot_publish_a_checkpoint(tmp_path: Path) -> None:
    def state(step: int) -> RunState:
        return RunState(run_id="r", step=step, policy_version=step, config_hash="h")

    old, new = CheckpointStore(tmp_path, keep=3), CheckpointStore(tmp_path, keep=3)
    old.take_over(1)
    (old.begin(4) / "shard").write_bytes(b"old")
    new.take_over(2)
    with pytest.raises(StageError, match=r"commit\(4\)"):
        old.commit(4, state(4))
    with pytest.raises(StageError, match="checkpoint"):
        old.begin(5)
    (new.begin(4) / "shard").write_bytes(b"new")
    with pytest.raises(StageError, match=r"commit\(4\)"):
        old.commit(4, state(4))
    path = new.commit(4, state(4))
    assert (path / "shard").read_bytes() == b"new"


def test_the_keys_of_an_ended_run_expire_unless_it_goes_on(redis_url: str) -> None:
    client = connect(redis_url)
    buffer = make_buffer(client, "fence-expiry")
    fill(buffer, "a", "b")
    buffer.take_over()
    buffer.consume(claim(buffer, 1), step=1)
    keys = Keys("fence-expiry")
    held = [key for key in (*keys.state, keys.last_take_over) if client.exists(key)]
    assert len(held) > 5
    buffer.let_expire(60)
    assert [key for key in held if not 0 < client.ttl(key) <= 60] == []
    buffer.take_over()
    assert [key for key in held if client.ttl(key) != -1] == []
    assert buffer.places() == {"a": "consumed", "b": "ready"}
