"""The order in which a step takes its groups in, and that none is taken twice."""

import itertools
import random

import pytest

from actors.curriculum import Curriculum
from actors.intake import InDrawOrder, WithinAge
from actors.rollout import Sampling
from cluster.types import GroupHeader, Message, Task

SAMPLING = Sampling(max_new_tokens=4, temperature=1.0, stop_token_ids=[0])
TASKS = [
    Task(task_id=f"t{i}", taskset="demo", messages=[Message(role="user", content=str(i))])
    for i in range(20)
]


def header(group_id: str, policy_version: int = 0) -> GroupHeader:
    return GroupHeader(
        group_id=group_id, task_id="t", min_policy_version=policy_version, num_tokens=[3, 3],
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


def test_one_batch_is_the_whole_step_in_the_order_of_drawing() -> None:
    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    drawn = [draws.next().group_id for _ in range(5)]
    intake = InDrawOrder(draws, num_groups=4, num_batches=1)
    assert draws.settle([drawn[1]]) == 1
    for group_id in (drawn[4], drawn[0], drawn[2]):
        assert intake.offer([header(group_id)]) == []
    [batch] = intake.offer([header(drawn[3])])
    assert [h.group_id for h in batch] == [drawn[0], drawn[2], drawn[3], drawn[4]]


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
    intake = InDrawOrder(draws, 4) if is_sync else WithinAge(draws, 4, 0, [])
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


@pytest.mark.parametrize("is_sync", [True, False])
def test_a_group_that_the_run_dropped_before_it_was_handed_out_is_a_stray(is_sync: bool) -> None:
    """Its producer failed after the group had been added: it must not count as used."""
    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    drawn = [draws.next().group_id for _ in range(4)]
    late = drawn[-1]
    intake = InDrawOrder(draws, 4) if is_sync else WithinAge(draws, 4, 0, [header(late)])
    assert draws.is_expected(late)
    if is_sync:
        assert intake.offer([header(late)]) == []
    assert intake.strays == []
    assert draws.settle([late]) == 1
    assert not draws.is_expected(late)
    assert intake.strays == [late]
    intake.forget(intake.strays)
    assert intake.strays == []
    drawn = [*drawn[:-1], draws.next().group_id]
    taken = [h.group_id for b in intake.offer([header(g) for g in drawn]) for h in b]
    assert taken == drawn == [h.group_id for h in intake.claimed]


def test_a_step_is_complete_although_one_of_its_groups_was_dropped_after_it_was_in() -> None:
    """10 groups come in batches of 3, and the last one alone."""
    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    drawn = [draws.next().group_id for _ in range(10)]
    intake = InDrawOrder(draws, 10)
    taken = intake.offer([header(g) for g in drawn[:3]])
    assert draws.settle([drawn[0]]) == 1  # its gradient is in: it is used
    assert intake.strays == []
    taken += intake.offer([header(g) for g in drawn[3:]])
    assert [len(batch) for batch in taken] == [3, 3, 3, 1]
    assert {h.group_id for h in intake.claimed} == set(drawn)


def test_groups_that_are_not_drawn_yet_are_no_part_of_a_step_complete_without_them() -> None:
    """The buffer has held them since before a restart."""
    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    begun = draws.state()
    drawn = [draws.next().group_id for _ in range(12)]
    draws.restore(begun, dict.fromkeys(drawn, 0))
    for _ in range(10):
        draws.next()
    intake = InDrawOrder(draws, 10)
    taken = intake.offer([header(g) for g in reversed(drawn[:2] + drawn[10:])])
    assert taken == intake.claimed == []
    assert [h.group_id for h in intake.waiting] == [*reversed(drawn[10:]), drawn[1], drawn[0]]
    taken += intake.offer([header(drawn[2])])
    draws.settle([drawn[0]])  # its gradient is in
    assert draws.next().group_id == drawn[10]
    taken += intake.offer([header(g) for g in drawn[3:10]])
    assert [len(batch) for batch in taken] == [3, 3, 3, 1]
    assert [h.group_id for h in intake.claimed] == drawn[:10]
    assert {h.group_id for h in intake.waiting} == set(drawn[10:])


@pytest.mark.parametrize("max_policy_age", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_long_rollouts_are_used_as_often_as_short_ones_and_none_too_old(
    max_policy_age: int, seed: int
) -> None:
    """A clock drives real slots, draws and intake; lengths are heavy-tailed, a step takes time.

    Without seats for those that are due, the long ones would be overtaken until they are too old.
    """
    num_groups, num_steps, rng = 8, 60, random.Random(seed)
    draws = Curriculum(TASKS, 3, SAMPLING, group_size=2)
    free, now, version = (max_policy_age + 1) * num_groups, 0.0, 0
    running: dict[str, tuple[float, int]] = {}  # group -> end, version
    lengths: dict[str, float] = {}
    left_over: list[GroupHeader] = []
    used: list[str] = []
    ages: list[int] = []
    while version < num_steps:
        intake = WithinAge(draws, num_groups, version - max_policy_age, left_over)
        intake.offer([])
        while len(intake.claimed) < num_groups:
            for _ in range(free):
                group_id = draws.next(version).group_id
                lengths[group_id] = min(20.0, rng.paretovariate(1.2))
                running[group_id] = (now + lengths[group_id], version)
            free = 0
            first = min(running, key=lambda g: running[g][0])
            end, at = running.pop(first)
            now = max(now, end)
            intake.offer([header(first, at)])
        left_over = intake.waiting
        ages += [version - h.min_policy_version for h in intake.claimed]
        used += [h.group_id for h in intake.claimed]
        now += 1.0
        version += 1
        free = draws.settle([h.group_id for h in intake.claimed])
        assert free == num_groups
    assert len(used) == len(set(used)) == num_groups * num_steps
    assert max(ages) <= max_policy_age
    assert set(list(lengths)[: num_groups * (num_steps - 1)]) <= set(used), "one was pushed out"
