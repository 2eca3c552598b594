"""The code verifier: does model-written Python pass tests that it never sees?

Invariant: the program gets inputs only; expected values stay in this process, where its answers
are compared as data, type for type. A program's own fault scores 0, a sandbox's fault abstains.
Used as `code` in a config; the tests come with the task (`tests` of a file taskset).
"""

import asyncio
import json
import math
import re
from functools import lru_cache
from typing import Any, Literal, cast

import msgspec

from cluster.errors import ConfigError, HoneError
from cluster.types import TrajectoryGroup, Verdict
from rewards.answers import after_thinking
from rewards.base import VerifierIO, abstention
from rewards.golden_sets import CODE
from rewards.sandbox import Limits, Tier, choose

MAX_CODE_BYTES = 64 << 10
BUDGET = 0.8  # of the verifier's time limit, for the tests of one program
WORKER = 0.95  # of the same: then a worker that has not kept the budget is killed
RUN_CASES = "rewards.code_runs:run_cases"
RUN_TESTS = "rewards.code_runs:run_tests"
_OPEN = re.compile(r"[ \t]{0,16}```(?:python3?|py)?[ \t]{0,16}", re.I)
_CLOSE = re.compile(r"[ \t]{0,16}```[ \t]{0,16}")


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either `input` and `output` (text) or `args` and `expected` (plain data)."""

    input: str = ""
    output: str | None = None
    args: list[Any] | None = None
    expected: Any = None


class Tests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `tests` of a task holds: cases, or the text of a unittest module.

    Examples: `{"cases": [{"input": "1 2", "output": "3"}]}`, `{"function": "add", "cases":
    [{"args": [1, 2], "expected": 3}]}`, `{"unittest": "assert add(1, 2) == 3"}`.
    """

    function: str = ""
    cases: list[Case] = []
    unittest: str = ""


class CodeVerifier:
    """Scores the share of tests that pass, or with `partial=False` 1.0 for all and else 0.0.

    Each test may take `test_timeout_s` and `memory_mib`; floats may differ by `tolerance`
    (relative or absolute). With `one_run_per_case` no case can learn of another. The tests of one
    program may take four fifths of the verifier's `timeout_s` in all: what is left then has failed
    if a test overran its own limit, and the check abstains if none did. Example: a program that
    passes 3 of 4 cases scores 0.75.
    """

    example = "```python\n{answer}\n```"
    golden = CODE

    def __init__(
        self,
        language: Literal["python"] = "python",
        partial: bool = True,
        test_timeout_s: float = 5.0,
        memory_mib: int = 512,
        output_kib: int = 64,
        file_mib: int = 16,
        tolerance: float = 0.0,
        one_run_per_case: bool = False,
        unsafe_ok: bool = False,
    ) -> None:
        if language != "python":
            raise ConfigError(f"language: only 'python' is offered, got {language!r}")
        if min(test_timeout_s, memory_mib, output_kib, file_mib) <= 0 or tolerance < 0:
            raise ConfigError(
                "test_timeout_s, memory_mib, output_kib and file_mib must be above 0 and "
                "tolerance not below"
            )
        self._partial = partial
        self._tolerance = tolerance
        self._one_run_per_case = one_run_per_case
        self._limits = Limits(
            wall_s=test_timeout_s,
            cpu_s=math.ceil(test_timeout_s),
            memory_bytes=memory_mib << 20,
            output_bytes=output_kib << 10,
            file_bytes=file_mib << 20,
        )
        self._tier = _tier(unsafe_ok)

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        if self._limits.wall_s > BUDGET * io.timeout_s:
            raise ConfigError(
                f"test_timeout_s: {self._limits.wall_s:g} s for a test needs a timeout_s of at "
                f"least {self._limits.wall_s / BUDGET:g} s, not {io.timeout_s:g} s"
            )
        try:
            tests = read_tests(group.task.entry)
        except ValueError as error:
            error_text = f"task {group.task.task_id}: {error}"
            return [Verdict(score=None, error=error_text) for _ in group.trajectories]
        codes = [extract_code(t.text) for t in group.trajectories]
        distinct = list(dict.fromkeys(codes))
        verdicts = await asyncio.gather(*(self._verdict(code, tests, io) for code in distinct))
        by_code = dict(zip(distinct, verdicts, strict=True))
        return [by_code[code] for code in codes]

    async def _verdict(self, code: str, tests: Tests, io: VerifierIO) -> Verdict:
        reason = why_unrunnable(code)
        if reason:
            return Verdict(score=0.0, evidence=reason)
        limits, budget_s = msgspec.to_builtins(self._limits), BUDGET * io.timeout_s
        limit_s, note = WORKER * io.timeout_s, ""
        try:
            if tests.unittest:
                raw = await io.run_isolated(
                    RUN_TESTS, self._tier, code, tests.unittest, limits, budget_s, timeout_s=limit_s
                )
                tally = msgspec.convert(raw, dict[str, int])
                passed, total = tally["passed"], tally["tests"]
            else:
                inputs = json.dumps([c.args if tests.function else c.input for c in tests.cases])
                raw = await io.run_isolated(
                    RUN_CASES, self._tier, code, tests.function, inputs, limits,
                    self._one_run_per_case, budget_s, timeout_s=limit_s,
                )  # fmt: skip
                answers = msgspec.convert(raw, list[tuple[str, str]])
                passed, total = 0, len(tests.cases)
                for case, (status, answer) in zip(tests.cases, answers, strict=True):
                    is_right = status == "ok" and self._is_right(tests, case, answer)
                    passed += is_right
                    note = note or ("" if is_right else status.replace("ok", "wrong answer"))
        except HoneError as error:
            return abstention(error)
        share = passed / total
        return Verdict(
            score=share if self._partial else float(share == 1.0),
            breakdown={"passed": float(passed), "tests": float(total)},
            evidence=f"{passed} of {total} tests" + (f", first fault: {note}" if note else ""),
        )

    def _is_right(self, tests: Tests, case: Case, answer: str) -> bool:
        if tests.function:
            return is_same(case.expected, json.loads(answer), self._tolerance)
        return _is_same_output(case.output or "", answer, self._tolerance)


@lru_cache(maxsize=2)
def _tier(unsafe_ok: bool) -> Tier:
    return choose(unsafe_ok)


def read_tests(entry: str) -> Tests:
    """The tests in `Task.entry`; raises `ValueError` when they cannot be run."""
    raw: Any = json.loads(entry).get("tests") if entry else None
    if isinstance(raw, str):
        raw = {"unittest": raw}
    if isinstance(raw, list):
        raw = {"cases": cast(list[object], raw)}
    if not raw:
        raise ValueError("has no tests")
    tests = msgspec.convert(raw, Tests)
    if not tests.cases and not tests.unittest:
        raise ValueError("tests must hold cases or a unittest module")
    for case in tests.cases:
        if (case.args if tests.function else case.output) is None:
            wanted = "`args` and `expected`" if tests.function else "`input` and `output`"
            raise ValueError(f"each case must have {wanted}")
    return tests


def extract_code(text: str) -> str:
    """The last fenced Python block after the thinking; without a fence, all of that text."""
    answer = after_thinking(text)[-4 * MAX_CODE_BYTES :]
    block: list[str] | None = None
    last: str | None = None
    for line in answer.split("\n"):
        if block is None:
            block = [] if _OPEN.fullmatch(line) else None
        elif _CLOSE.fullmatch(line):
            last, block = "".join(block), None
        else:
            block.append(line + "\n")
    return answer.strip() if last is None else last


def why_unrunnable(code: str) -> str:
    if not code.strip():
        return "no code"
    if len(code.encode(errors="replace")) > MAX_CODE_BYTES:
        return f"more than {MAX_CODE_BYTES} bytes of code"
    if "\0" in code or any(0xD800 <= ord(c) <= 0xDFFF for c in code):
        return "characters that are no text"
    return ""


def is_same(expected: Any, answer: Any, tolerance: float) -> bool:
    """Equal in value and type (True is not 1, 1 is not 1.0), floats up to `tolerance`."""
    if isinstance(expected, list) and isinstance(answer, list):
        pairs = cast(list[Any], expected), cast(list[Any], answer)
        return len(pairs[0]) == len(pairs[1]) and all(
            is_same(e, a, tolerance) for e, a in zip(*pairs, strict=True)
        )
    if isinstance(expected, dict) and isinstance(answer, dict):
        wanted, given = cast(dict[str, Any], expected), cast(dict[str, Any], answer)
        return wanted.keys() == given.keys() and all(
            is_same(value, given[key], tolerance) for key, value in wanted.items()
        )
    if tolerance and _is_number(cast(object, expected)) and _is_number(cast(object, answer)):
        return expected == answer or _is_close(
            cast(float, expected), cast(float, answer), tolerance
        )
    return type(cast(object, expected)) is type(cast(object, answer)) and expected == answer


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_same_output(expected: str, printed: str, tolerance: float) -> bool:
    """Equal but for blanks at the end of lines and of the text."""
    wanted = [line.rstrip() for line in expected.rstrip().splitlines()]
    given = [line.rstrip() for line in printed.rstrip().splitlines()]
    if wanted == given or not tolerance:
        return wanted == given
    rows = [line.split() for line in wanted], [line.split() for line in given]
    return [len(row) for row in rows[0]] == [len(row) for row in rows[1]] and all(
        e == a or _is_close(e, a, tolerance)
        for wanted_row, given_row in zip(*rows, strict=True)
        for e, a in zip(wanted_row, given_row, strict=True)
    )


def _is_close(expected: str | float, answer: str | float, tolerance: float) -> bool:
    try:
        return math.isclose(
            float(expected), float(answer), rel_tol=tolerance, abs_tol=tolerance
        )  # fmt: skip
    except (ValueError, OverflowError):
        return False
