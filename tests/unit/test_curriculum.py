"""The order of tasks is a function of the seed, and survives a restart."""

import pytest

from actors.curriculum import MAX_EMPTY_WINDOWS, WINDOW, Curriculum
from actors.producer import _hinted
from actors.rollout import Sampling
from cluster.errors import StageError
from cluster.types import Message, Task

SAMPLING = Sampling(max_new_tokens=4, temperature=1.0, stop_token_ids=[0])
TASKS = [
    Task(task_id=f"t{i}", taskset="demo", messages=[Message(role="user", content=str(i))])
    for i in range(7)
]


def curriculum(seed: int = 3) -> Curriculum:
    return Curriculum(TASKS, seed, SAMPLING, group_size=4)


def test_each_pass_is_a_new_permutation_of_all_tasks() -> None:
    draws = curriculum()
    passes = [[draws.next().task.task_id for _ in TASKS] for _ in range(3)]
    assert all(sorted(p) == sorted(t.task_id for t in TASKS) for p in passes)
    assert len({tuple(p) for p in passes}) > 1


def test_equal_seeds_give_equal_groups_and_sampling_seeds() -> None:
    first, second, other = curriculum(), curriculum(), curriculum(seed=4)
    a, b, c = ([x.next() for _ in range(20)] for x in (first, second, other))
    assert a == b
    assert a != c
    assert len({request.group_id for request in a}) == 20
    assert len({request.sampling.seed for request in a}) == 20


def test_a_resumed_run_draws_the_unsettled_groups_again_and_then_goes_on() -> None:
    whole = curriculum()
    expected = [whole.next() for _ in range(12)]
    before = curriculum()
    drawn = [before.next() for _ in range(8)]
    before.settle([request.group_id for request in drawn[:5]])
    after = curriculum()
    after.restore(before.state())
    assert [after.next() for _ in range(7)] == expected[5:]


def test_nothing_to_learn_from_is_an_error_that_names_the_knobs() -> None:
    draws = curriculum()
    for _ in range(WINDOW * MAX_EMPTY_WINDOWS - 1):
        draws.observe(is_uniform=True, mean_reward=0.0)
    with pytest.raises(StageError, match=r"never rewarded.*group_size"):
        draws.observe(is_uniform=True, mean_reward=0.0)


def test_draws_that_a_restart_must_repeat_stay_in_the_state_until_they_are_repeated() -> None:
    before = curriculum()
    drawn = [before.next() for _ in range(6)]
    after = curriculum()
    after.restore(before.state())
    after.next()
    again = curriculum()
    again.restore(after.state())
    assert [again.next() for _ in range(6)] == drawn


def test_a_group_held_by_the_buffer_and_settled_before_its_draw_is_not_drawn() -> None:
    whole = curriculum()
    expected = [whole.next().group_id for _ in range(6)]
    draws = curriculum()
    draws.restore(draws.state(), held={expected[0]: 0, expected[2]: 0})
    assert draws.is_held(expected[2])
    assert draws.settle([expected[2]]) == 0, "it had no slot"
    resumed = curriculum()
    resumed.restore(draws.state(), held={expected[0]: 0})
    for each in (draws, resumed):
        drawn = [each.next().group_id for _ in range(5)]
        assert drawn == [g for g in expected if g != expected[2]]
        assert each.settle(drawn) == 5


def test_requests_of_a_curriculum_without_seeds_have_none_at_any_level() -> None:
    request = Curriculum(TASKS, 3, SAMPLING, group_size=4, is_seeded=False).next()
    assert request.sampling.seed is None
    assert _hinted(request, 1).sampling.seed is None
