"""The worker's side of the code verifier: runs a program's tests in the sandbox, within a budget.

Invariant: a program that overruns the limit of one test has failed it; when the budget of all tests
ends before that, nothing is said about the program. Runs inside an isolated worker
(`rewards.isolation`); called by `rewards.code_verifier` by its path.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec

from cluster.errors import HoneError
from rewards.code_tests import is_right, read_tests
from rewards.sandbox import Limits, RunResult, Sandbox, Tier, sandbox_of

MAX_DEPTH = 32
TIMEOUTS = ("wall_timeout", "cpu_timeout")
Answer = tuple[str, str]  # status and what was printed, or the function's value as JSON


class BudgetError(HoneError):
    """The tests of one program took longer in all than they may, none of them by itself."""


class _Clock:
    """What is left of the budget, and whether a test has overrun its own limit yet."""

    def __init__(self, budget_s: float, limits: Limits) -> None:
        self._budget_s = budget_s
        self._end = time.monotonic() + budget_s
        self._limits = limits
        self._has_overrun = False

    def limits(self) -> Limits | None:
        """Of the next run; None when the program has overrun a test and no time is left."""
        left = self._end - time.monotonic()
        if left > 0:
            return msgspec.structs.replace(self._limits, wall_s=min(self._limits.wall_s, left))
        if self._has_overrun:
            return None
        raise BudgetError(
            f"the tests took more than {self._budget_s:g} s in all, none more than its own "
            f"{self._limits.wall_s:g} s: raise the verifier's timeout_s"
        )

    def is_overrun(self, status: str, given: Limits) -> bool:
        """Whether a test without an answer used up its own limit, not just the budget's rest."""
        is_full = given.wall_s == self._limits.wall_s or status == "cpu_timeout"
        self._has_overrun |= status in TIMEOUTS and is_full
        return self._has_overrun


def check_cases(
    tier: Tier,
    code: str,
    entry: str,
    limits: dict[str, Any],
    one_run_per_case: bool,
    tolerance: float,
    budget_s: float,
) -> tuple[int, str]:
    """How many cases of a task's `entry` pass, and what was wrong with the first of the others.

    Each answer is compared here as it comes: together they may be larger than a worker's reply.
    Raises `BudgetError`.
    """
    tests = read_tests(entry)
    inputs = [case.args if tests.function else case.input for case in tests.cases]
    bound = msgspec.convert(limits, Limits)
    answers = run_cases(tier, code, tests.function, inputs, bound, one_run_per_case, budget_s)
    num_passed, fault = 0, ""
    for case, (status, answer) in zip(tests.cases, answers, strict=True):
        if status == "ok" and is_right(tests, case, answer, tolerance):
            num_passed += 1
        else:
            fault = fault or status.replace("ok", "wrong answer")
    return num_passed, fault


def run_cases(
    tier: Tier,
    code: str,
    function: str,
    inputs: Sequence[Any],
    limits: Limits,
    one_run_per_case: bool,
    budget_s: float,
) -> Iterator[Answer]:
    """One answer per input, as they come. Raises `BudgetError`."""
    sandbox, clock = sandbox_of(tier), _Clock(budget_s, limits)
    if not function:
        yield from (_run_program(sandbox, code, text, clock) for text in inputs)
        return
    for batch in [[arguments] for arguments in inputs] if one_run_per_case else [list(inputs)]:
        yield from _run_calls(sandbox, code, function, batch, clock)


def _run_program(sandbox: Sandbox, code: str, text: str, clock: _Clock) -> Answer:
    while limits := clock.limits():
        reply = sandbox.run("program", code, limits, stdin=text)
        if reply.status not in TIMEOUTS or clock.is_overrun(reply.status, limits):
            return reply.status, reply.stdout if reply.status == "ok" else ""
    return "wall_timeout", ""


def _run_calls(
    sandbox: Sandbox, code: str, function: str, calls: list[Any], clock: _Clock
) -> list[Answer]:
    """Calls of one process; one that a timeout cut short after others is tried again, alone with
    those after it, so that each may take the limit of a test.
    """
    answers: list[Answer] = []
    while len(answers) < len(calls) and (limits := clock.limits()):
        batch = calls[len(answers) :]
        reply = sandbox.run("calls", code, limits, function=function, calls=batch)
        given = read_answers(reply, len(batch))
        if reply.status not in TIMEOUTS:
            return answers + given
        done = [answer for answer in given if answer[0] not in TIMEOUTS]
        if not done and clock.is_overrun(reply.status, limits):
            done = given[:1]
        answers += done
    return answers + [("wall_timeout", "")] * (len(calls) - len(answers))


def run_tests(
    tier: Tier, code: str, tests: str, limits: dict[str, Any], budget_s: float
) -> dict[str, int]:
    """How many tests of a module there are and pass: `tests`, `passed`. Raises `HoneError`."""
    bound = msgspec.convert(limits, Limits)
    whole = msgspec.structs.replace(bound, wall_s=budget_s, cpu_s=math.ceil(budget_s))
    reply = sandbox_of(tier).run_tests(code, tests, whole, call_s=bound.wall_s)
    if reply.status in TIMEOUTS:
        raise BudgetError(
            f"the test module took more than {budget_s:g} s: raise the verifier's timeout_s"
        )
    try:
        return msgspec.json.decode(reply.result, type=dict[str, int])
    except msgspec.DecodeError:
        last = reply.stderr.strip().splitlines()[-1:] or [reply.status]
        raise HoneError(f"the test module gave no tally: {last[0]}") from None


def read_answers(reply: RunResult, count: int) -> list[Answer]:
    """One answer per call from distrusted lines; too many lines spoil all of them."""
    lines = reply.result.splitlines()
    if len(lines) > count:
        return [("result_invalid", "")] * count
    answers: list[Answer] = []
    for line in lines:
        try:
            value: Any = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError):
            value = None
        if not isinstance(value, dict) or _is_deep(cast(object, value)):
            answers.append(("result_invalid", ""))
        elif "value" in value:
            text = msgspec.json.encode(cast(dict[str, Any], value)["value"]).decode()
            answers.append(("ok", text))
        else:
            answers.append(("model_error", ""))
    missing = "model_error" if reply.status == "ok" else reply.status
    return answers + [(missing, "")] * (count - len(answers))


def _is_deep(value: object, max_depth: int = MAX_DEPTH) -> bool:
    """Whether lists and objects are nested more than `max_depth` deep; it goes no deeper itself."""
    if isinstance(value, dict):
        children = list(cast(dict[str, object], value).values())
    elif isinstance(value, list):
        children = cast(list[object], value)
    else:
        return False
    return max_depth == 0 or any(_is_deep(child, max_depth - 1) for child in children)
