"""The order in which a step takes its groups in, and that none is taken twice."""

import itertools

import pytest

from actors.curriculum import Curriculum
from actors.intake import AsTheyCome, InDrawOrder
from actors.rollout import Sampling
from cluster.types import GroupHeader, Message, Task

SAMPLING = Sampling(max_new_tokens=4, temperature=1.0, stop_token_ids=[0])
TASKS = [
    Task(task_id=f"t{i}", taskset="demo", messages=[Message(role="user", content=str(i))])
    for i in range(20)
]


def header(group_id: str) -> GroupHeader:
    return GroupHeader(
        group_id=group_id, task_id="t", min_policy_version=0, num_tokens=[3, 3],
        num_loss_tokens=2, reward_versions={}, priority=0.0,
    )  # fmt: skip


def batches_of(arrivals: list[str], draws: Curriculum) -> list[list[str]]:
    intake = InDrawOrder(draws, num_groups=8)
    offered = [intake.offer([header(group_id)]) for group_id in arrivals]
    return [[h.group_id for h in batch] for batches in offered for batch in batches]


@pytest.mark.parametrize("seed", range(5))
def test_in_sync_mode_batches_do_not_depend_on_the_order_of_arrival(seed: int) -> None:
    import random

    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    drawn = [draws.next().group_id for _ in range(8)]
    arrivals = random.Random(seed).sample(drawn, 8)
    expected = [drawn[i : i + 2] for i in range(0, 8, 2)]
    assert batches_of(arrivals, draws) == expected


def test_a_dropped_draw_is_followed_by_the_next_and_moves_the_batches_alike() -> None:
    outcomes: list[list[list[str]]] = []
    for is_dropped_first in (True, False):
        draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
        drawn = [draws.next().group_id for _ in range(8)]
        intake = InDrawOrder(draws, num_groups=8)
        batches: list[list[GroupHeader]] = []
        if is_dropped_first:
            assert draws.settle([drawn[1]]) == 1
            drawn.append(draws.next().group_id)
        for group_id in reversed(drawn[2:] if is_dropped_first else [drawn[0], *drawn[2:]]):
            batches += intake.offer([header(group_id)])
        if is_dropped_first:
            batches += intake.offer([header(drawn[0])])
        else:
            assert draws.settle([drawn[1]]) == 1
            batches += intake.offer([header(draws.next().group_id)])
        outcomes.append([[h.group_id for h in batch] for batch in batches])
        assert [h.group_id for h in intake.claimed] == list(itertools.chain(*outcomes[-1]))
    assert outcomes[0] == outcomes[1]
    assert sum(map(len, outcomes[0])) == 8


@pytest.mark.parametrize("is_sync", [True, False])
def test_a_group_that_the_buffer_delivers_again_is_taken_in_once(is_sync: bool) -> None:
    """A lease ran out (a clock jumped) while its group waited for the rest of the step."""
    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    drawn = [draws.next().group_id for _ in range(4)]
    intake = InDrawOrder(draws, 4) if is_sync else AsTheyCome()
    first = intake.offer([header(g) for g in drawn[:2]])
    second = intake.offer([header(g) for g in drawn])
    taken = [h.group_id for batch in (*first, *second) for h in batch]
    assert taken == drawn
    assert [h.group_id for h in intake.claimed] == drawn


def test_a_lost_group_is_replaced_by_another() -> None:
    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    drawn = [draws.next().group_id for _ in range(4)]
    intake = InDrawOrder(draws, 4)
    [batch, *_] = intake.offer([header(drawn[0])])
    assert len(batch) == 1
    intake.forget([drawn[0]])
    draws.settle([drawn[0]])
    drawn = [*drawn[1:], draws.next().group_id]
    rest = intake.offer([header(g) for g in drawn])
    assert [h.group_id for b in rest for h in b] == drawn
