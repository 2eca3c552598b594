"""The exact step scorer: what counts as a right step of a worked sum, and of other arithmetic."""

import time

import pytest

from cluster.types import Message, Task
from rewards.arithmetic_steps import ArithmeticSteps
from rewards.steps import compile_separator, split_steps

LINES = compile_separator(r"\n+")


def _task(question: str, reference: str) -> Task:
    message = Message(role="user", content=question)
    return Task(task_id="t", taskset="x", messages=[message], reference=reference)


SUM = _task("4 - 1 - 7 =", "-4")


async def _scores(task: Task, text: str) -> list[float] | str:
    (scored,) = await ArithmeticSteps().score(task, [split_steps(text, LINES)])
    return scored.error or scored.scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 - 1 = 3\n3 - 7 = -4\n-4", [1, 1, 1]),
        ("4 - 1 = 2\n2 - 7 = -5\n-5", [0, 0, 0]),  # a wrong sum, then consistent
        ("4 - 1 = 3\n2 - 7 = -5\n-5", [1, 0, 0]),  # a total copied wrongly
        ("4 - 1 = 3\n3 - 6 = -3\n-3", [1, 0, 0]),  # a term the question does not have
        ("4 - 1 = 3\n3 - 1 = 2\n2", [1, 0, 0]),  # a term taken twice
        ("4 - 1 = 3\n3", [1, 0]),  # a term left out
        ("4 - 1 = 3\n3 - 7 = -4\n4", [1, 1, 0]),  # the answer copied wrongly
        ("4 - 7 = -3\n-3 - 1 = -4\n-4", [1, 1, 1]),  # another order
        ("4 - 1 - 7 = -4\nThe answer is -4.", [1, 1]),
        ("4 - 1 = 3 = 3 + 0\n3 - 7 = -4", [1, 1]),
        ("-4", [1]),
        ("5", [0]),
        ("Let us see.\n4 - 1 = 3\nso far so good\n3 - 7 = 4\nhm", [1, 1, 1, 0, 0]),
        ("no idea", "no equation and no number to check"),
    ],
)
async def test_steps_of_a_sum(text: str, expected: list[float] | str) -> None:
    assert await _scores(SUM, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 * 3 = 36\n36 / 8 = 4.5\n#### 4.5", [1, 1, 1]),
        ("2 + 3 * 4 = 14", [1]),
        ("2 + 3 * 4 = 20\n4.5", [0, 0]),
        ("1 / 0 = 0", [0]),
        ("2 - -3 = 5\n5 * -2 = -10", [1, 1]),
        (r"7 = 7\n\boxed{4.5}", [1]),
        (f"{'9' * 41} + 1 = 2", [0]),
    ],
)
async def test_other_arithmetic_is_checked_line_by_line(text: str, expected: list[float]) -> None:
    assert await _scores(_task("A word problem with 3 eggs.", "4.5"), text) == expected


@pytest.mark.parametrize(
    "step",
    ["1" + " " * 60_000 + "x", "answer is" + " " * 60_000 + "x", " " * 60_000, "1+" * 30_000,
     "1 = " * 15_000, "- " * 30_000, "1" * 60_000],
)  # fmt: skip
async def test_no_step_takes_long_or_holds_up_the_event_loop(step: str) -> None:
    started = time.perf_counter()
    await ArithmeticSteps().score(_task("1 + 2", "3"), [[step] * 8])
    assert time.perf_counter() - started < 1.0
