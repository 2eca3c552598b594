"""Worked steps of reasoning_gym's problems: right to the step scorer, and a ladder of hints."""

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.guide import Guide
from actors.hints import DatasetHints, names
from actors.rollout import Guiding
from cluster.types import Task
from rewards.arithmetic_steps import ArithmeticSteps
from rewards.gym_taskset import ReasoningGymTaskset
from rewards.steps import compile_separator, split_steps

LINES = compile_separator(r"\n+")


async def _scores(task: Task, text: str) -> list[float] | str:
    (scored,) = await ArithmeticSteps().score(task, [split_steps(text, LINES)])
    return scored.error or scored.scores


@given(st.integers(0, 10_000), st.data())
@settings(max_examples=60, deadline=None)
async def test_worked_solutions_are_right_and_a_changed_digit_is_found(
    seed: int, data: st.DataObject
) -> None:
    config = {"min_terms": 3, "max_terms": 7, "min_digits": 1, "max_digits": 3}
    settings = {"dataset": "chain_sum", "question_regex": "problem: (.*)", "config": config}
    (task,) = ReasoningGymTaskset(size=1, seed=seed, **settings).load()
    steps = split_steps(task.solution, LINES)
    assert await _scores(task, task.solution) == [1.0] * len(steps)
    index = data.draw(st.integers(0, len(steps) - 1))
    places = [i for i, letter in enumerate(steps[index]) if letter.isdigit()]
    place = data.draw(st.sampled_from(places))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != steps[index][place]]))
    changed = steps[index][:place] + digit + steps[index][place + 1 :]
    scores = await _scores(task, "".join([*steps[:index], changed, *steps[index + 1 :]]))
    assert scores == [1.0] * index + [0.0] * (len(steps) - index)


async def test_a_ladder_of_real_worked_steps_never_names_the_answer() -> None:
    tasks = ReasoningGymTaskset("gsm_symbolic", size=40, seed=5).load()
    program, source = Guide(), DatasetHints()
    assert isinstance(program, Guiding)
    program.check(tasks)
    hinted = [task for task in tasks if program.num_levels(task)]
    assert len(hinted) >= 20
    for task in hinted:
        ladder = [await source.hint(task, n + 1) for n in range(program.num_levels(task))]
        assert all(later.startswith(earlier) for earlier, later in zip(ladder, ladder[1:]))  # noqa: B905, RUF007
        assert not any(names(step, task.reference) for step in ladder)
