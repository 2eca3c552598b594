"""Groups that another than the learner takes in hand while they wait, as when they are scored anew:
only what it holds a lease on.
"""

import msgspec
import pytest
import redis

from cluster.errors import FencedError
from cluster.replay_buffer import ReplayBuffer
from tests.replay_checker import claim, fill, make_buffer, make_group


def test_an_owner_drops_only_what_it_holds_a_lease_on(buffer: ReplayBuffer) -> None:
    fill(buffer, "a", "b", "c")
    assert buffer.take(["a"], "rewards") == ["a"]
    assert claim(buffer, 1) == ["b"]
    assert [buffer.drop(group_id, "swapped", "rewards") for group_id in "bc"] == [False, False]
    buffer.consume(["b"], step=1)
    assert not buffer.drop("b", "swapped", "rewards")
    assert buffer.stats().dropped == {}
    assert buffer.drop("a", "swapped", "rewards")
    assert buffer.drop("a", "swapped", "rewards"), "a call whose reply was lost is repeated"
    assert buffer.stats().dropped == {"swapped": 1}
    assert claim(buffer) == ["c"]


def test_a_group_is_replaced_by_the_owner_of_its_lease_only(
    buffer: ReplayBuffer, client: redis.Redis, run_id: str
) -> None:
    for group_id in ("a", "b", "c"):
        buffer.add(make_group(group_id))
    claim(buffer, 1)
    assert [header.group_id for header in buffer.ready()] == ["b", "c"]
    assert buffer.take(["a", "c", "unknown"], "rewards") == ["c"]
    before = buffer.stats().payload_bytes
    [group] = buffer.fetch(["c"])
    longer = msgspec.structs.replace(group, reward_versions={"rubric": "2-" + "0" * 100})
    assert buffer.replace(longer, "rewards")
    assert buffer.stats().payload_bytes >= before + 100
    assert not buffer.replace(group, "somebody else")
    buffer.epoch = buffer.take_over()
    make_buffer(client, run_id).take_over()
    with pytest.raises(FencedError):
        buffer.replace(group, "rewards")
    buffer.epoch = -1
    assert buffer.release(["c"], "rewards") == 1
    assert not buffer.replace(group, "rewards")
    [header] = [h for h in buffer.ready() if h.group_id == "c"]
    assert header.reward_versions == buffer.fetch(["c"])[0].reward_versions
    assert header.reward_versions == longer.reward_versions
    buffer.drop("c", "seen")
    assert not buffer.replace(longer, "rewards")
    assert not buffer.holds("c")
    assert buffer.stats().payload_bytes < before
