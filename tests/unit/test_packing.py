"""The packing plan and the packed rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.types import GroupHeader
from learners.batch import MicroBatch, Row
from learners.packing import assign, plan_groups


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    world_size=st.integers(1, 4),
    max_tokens=st.integers(20, 100),
)
def test_every_sequence_is_planned_once_within_the_budget(
    lengths: list[int], world_size: int, max_tokens: int
) -> None:
    shares = assign(lengths, world_size, max_tokens)
    assert len(shares) == world_size
    assert len({len(share) for share in shares}) == 1, "every rank runs the same collectives"
    assert sorted(i for share in shares for part in share for i in part) == [*range(len(lengths))]
    for part in (part for share in shares for part in share):
        assert sum(lengths[i] for i in part) <= max_tokens or len(part) == 1
    loads = [sum(lengths[i] for part in share for i in part) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert assign(lengths, world_size, max_tokens) == shares


def test_the_documented_example() -> None:
    assert assign([5, 3, 2], 2, 6) == [[[0]], [[1, 2]]]
    assert assign([50], 2, 6) == [[[0]], [[]]], "longer than the budget: a micro-batch of its own"


def test_a_rank_needs_only_the_groups_of_its_share() -> None:
    headers = [
        GroupHeader(
            group_id=name,
            task_id="t",
            min_policy_version=0,
            num_tokens=num_tokens,
            num_loss_tokens=1,
            reward_versions={},
            priority=0.0,
        )
        for name, num_tokens in (("a", [9]), ("b", [5, 4]))
    ]
    plan = plan_groups(headers, world_size=2, max_tokens=10)
    assert plan.group_ids(0) == ["a"]
    assert plan.group_ids(1) == ["b"]


def test_rows_lie_end_to_end_and_only_written_tokens_count() -> None:
    first = Row(
        context=np.array([10, 11, 12], dtype=np.int32),
        completion=np.array([20, 21], dtype=np.int32),
        loss_mask=np.array([True, True]),
        rollout_logprobs=np.array([-1, -2], dtype=np.float32),
        advantages=np.array([0.5, 0.5], dtype=np.float32),
        temperature=0.7,
    )
    second = Row(
        context=np.array([13, 14], dtype=np.int32),
        completion=np.array([22, 23, 24], dtype=np.int32),
        loss_mask=np.array([True, False, True]),  # the middle token came from a tool
        rollout_logprobs=np.array([-3, 0, -4], dtype=np.float32),
        advantages=np.array([-1, -1, -2], dtype=np.float32),
    )
    pack = MicroBatch.pack([first, second])
    assert pack.token_ids.tolist() == [10, 11, 12, 20, 21, 13, 14, 22, 23, 24]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert pack.cu_seqlens.tolist() == [0, 5, 10]
    assert pack.loss_index.tolist() == [2, 3, 6, 8]
    assert pack.labels.tolist() == [20, 21, 22, 24]
    assert pack.sequence_ids.tolist() == [0, 0, 1, 1]
    assert pack.sequence_loss_tokens.tolist() == [2, 2]
    assert pack.rollout_logprobs.tolist() == [-1, -2, -3, -4]
    assert pack.advantages.tolist() == [0.5, 0.5, -1, -2]
    assert pack.temperature.tolist() == pytest.approx([0.7, 0.7, 1, 1])
    assert (pack.num_tokens, pack.num_loss_tokens, pack.num_sequences) == (10, 4, 2)


def test_an_empty_pack_can_still_run() -> None:
    pack = MicroBatch.pack([])
    assert pack.token_ids.tolist() == [0]
    assert (pack.num_tokens, pack.num_loss_tokens, pack.num_sequences) == (0, 0, 0)


def test_a_sequence_without_context_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a context"):
        Row.plain(np.zeros(0, dtype=np.int32), np.ones(2, dtype=np.int32))
