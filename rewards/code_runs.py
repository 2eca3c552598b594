"""The worker's side of the code verifier: runs a program's tests in the sandbox, within a budget.

Invariant: each test has the limits of a run to itself, and one that overruns them has failed, it
alone. When the budget of all tests ends, what is left has failed if another test had; if none had,
nothing is said about the program. Runs inside an isolated worker (`rewards.isolation`); called by
`rewards.code_verifier` by its path.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec

from cluster.errors import HoneError
from rewards.code_tests import MAX_CASE_BYTES, is_right, read_tests
from rewards.sandbox import Limits, RunResult, Sandbox, Tier, sandbox_of

MAX_DEPTH = 32
MAX_BATCH_BYTES = MAX_CASE_BYTES  # of the arguments of one process's calls
TIMEOUTS = ("wall_timeout", "cpu_timeout")
Answer = tuple[str, str]  # status and what was printed, or the function's value as JSON


class BudgetError(HoneError):
    """The tests of one program took longer in all than they may, none of them by itself."""


class _Clock:
    """What is left of the budget."""

    def __init__(self, budget_s: float, limits: Limits) -> None:
        self._budget_s = budget_s
        self._end = time.monotonic() + budget_s
        self._limits = limits

    def limits(self) -> Limits:
        """Of the next run. Raises `BudgetError` when no time is left."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise BudgetError(
                f"the tests took more than {self._budget_s:g} s in all, none more than its own "
                f"{self._limits.wall_s:g} s: raise the verifier's timeout_s"
            )
        return msgspec.structs.replace(self._limits, wall_s=min(self._limits.wall_s, left))

    def is_cut_short(self, status: str, given: Limits) -> bool:
        """Whether it was the budget that ended a run, not the limit of a test."""
        return status == "wall_timeout" and given.wall_s < self._limits.wall_s


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
    Raises `BudgetError` when the budget ends before a case has failed.
    """
    tests = read_tests(entry)
    inputs = [case.args if tests.function else case.input for case in tests.cases]
    bound = msgspec.convert(limits, Limits)
    answers = run_cases(tier, code, tests.function, inputs, bound, one_run_per_case, budget_s)
    num_passed, fault = 0, ""
    try:
        for case, (status, answer) in zip(tests.cases, answers, strict=True):
            if status == "ok" and is_right(tests, case, answer, tolerance):
                num_passed += 1
            else:
                fault = fault or status.replace("ok", "wrong answer")
    except BudgetError:
        if not fault:
            raise
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
    for batch in _batches(inputs, 1 if one_run_per_case else MAX_BATCH_BYTES):
        yield from _run_calls(sandbox, code, function, batch, clock)


def _batches(inputs: Sequence[Any], max_bytes: int) -> Iterator[list[Any]]:
    """The arguments of calls in parts of at most `max_bytes` of JSON, or of a single call."""
    batch, size = list[Any](), 0
    for arguments in inputs:
        more = len(json.dumps(arguments))
        if batch and size + more > max_bytes:
            yield batch
            batch, size = [], 0
        batch.append(arguments)
        size += more
    yield batch


def _run_program(sandbox: Sandbox, code: str, text: str, clock: _Clock) -> Answer:
    while True:
        limits = clock.limits()
        reply = sandbox.run("program", code, limits, stdin=text)
        if not clock.is_cut_short(reply.status, limits):
            return reply.status, reply.stdout if reply.status == "ok" else ""


def _run_calls(
    sandbox: Sandbox, code: str, function: str, calls: list[Any], clock: _Clock
) -> Iterator[Answer]:
    """Calls of one process. The first one without an answer (too slow, too much output, a crash) is
    tried again as the first of a new process, where it has the limits to itself; if it gets no
    answer there, it has failed, and another process goes on with those after it.
    """
    while calls:
        limits = clock.limits()
        reply = sandbox.run("calls", code, limits, function=function, calls=calls)
        given = read_answers(reply, len(calls))
        if not given and not clock.is_cut_short(reply.status, limits):
            given = [(reply.status.replace("ok", "model_error"), "")]
        yield from given
        calls = calls[len(given) :]


def run_tests(
    tier: Tier, code: str, tests: str, limits: dict[str, Any], budget_s: float
) -> dict[str, int]:
    """How many tests of a module there are and pass: `tests`, `passed`. Raises `HoneError`."""
    bound = msgspec.convert(limits, Limits)
    whole = msgspec.structs.replace(bound, wall_s=budget_s, cpu_s=math.ceil(budget_s))
    reply = sandbox_of(tier).run_tests(code, tests, whole, call_s=bound.wall_s)
    too_slow = BudgetError(
        f"the test module took more than {budget_s:g} s: raise the verifier's timeout_s"
    )
    if reply.status in TIMEOUTS:
        raise too_slow
    try:
        tally = msgspec.json.decode(reply.result, type=dict[str, int])
    except msgspec.DecodeError:
        last = reply.stderr.strip().splitlines()[-1:] or [reply.status]
        raise HoneError(f"the test module gave no tally: {last[0]}") from None
    if tally["spent"]:
        raise too_slow
    return tally


def read_answers(reply: RunResult, count: int) -> list[Answer]:
    """One answer per whole line, distrusted; more than `count` lines spoil all of them."""
    lines = reply.result.split("\n")[:-1]
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
    return answers


def _is_deep(value: object, max_depth: int = MAX_DEPTH) -> bool:
    """Whether lists and objects are nested more than `max_depth` deep; it goes no deeper itself."""
    if isinstance(value, dict):
        children = list(cast(dict[str, object], value).values())
    elif isinstance(value, list):
        children = cast(list[object], value)
    else:
        return False
    return max_depth == 0 or any(_is_deep(child, max_depth - 1) for child in children)
