"""What the tests of a program are, and whether an answer of the program is the right one.

Invariant: answers are compared as data, type for type, and only outside the sandbox, into which no
expected value goes. Read by `rewards.code_verifier`; the comparison runs in an isolated worker,
called by `rewards.code_runs`.
"""

import json
import math
from typing import Any, cast

import msgspec

MAX_CASE_BYTES = 7 << 20  # of JSON: a request to the sandbox is at most 8 MiB with the program


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
    if 6 * len(entry) > MAX_CASE_BYTES:  # as ASCII a character is six bytes at the most
        for sent in [tests.unittest, *(case.args or case.input for case in tests.cases)]:
            size = len(json.dumps(sent))
            if size > MAX_CASE_BYTES:
                raise ValueError(
                    f"the input of a test, or a test module, has {size >> 20} MiB as JSON, at most "
                    f"{MAX_CASE_BYTES >> 20} MiB are accepted"
                )
    return tests


def is_right(tests: Tests, case: Case, answer: str, tolerance: float) -> bool:
    """Whether what was printed, or the function's value as JSON, is what the case expects."""
    if tests.function:
        return is_same(case.expected, json.loads(answer), tolerance)
    return _is_same_output(case.output or "", answer, tolerance)


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
