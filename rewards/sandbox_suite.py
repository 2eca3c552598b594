"""Trusted test modules, run in a sandbox of their own against a program in another one.

Invariant: only plain data comes from the program, and what fails before the program was ever called
is not held against it. Standard library only; called by `rewards.sandbox_zygote`.
"""

import ast
import builtins
import json
import math
import os
import select
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from rewards.sandbox_program import PEER_FD, RESULT_FD, load, mark, unmark, write_all

CALLS = 0.95  # of the time of a module; the rest is for its tally
INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}  # values like others; NaN is none


def run_tests(request: dict[str, Any]) -> None:
    """Trusted tests against `solution`, whose functions live in another sandbox.

    Counts the methods of test cases, `test...` functions without parameters and asserts at the top
    level; where there are none of these, calls at the top level (`check(add)`). No name needs an
    import: what neither the module nor Python defines is a function of the solution. What fails
    after it called the solution is a failed test; a top-level statement or a test that fails by
    itself ends the module without a tally. `spent` is 1 when the time ended before a test failed.
    """
    limits = request["limits"]
    solution = Solution(request["call_s"], CALLS * limits["wall_s"], limits["output_bytes"])
    module = types.ModuleType("solution")
    module.__getattr__ = solution.function  # type: ignore[method-assign]
    sys.modules["solution"] = module
    scope = load("", "tests")
    scope["__builtins__"] = Names(solution)
    lines = list(script(ast.parse(request["code"]), scope, solution))
    tests, passed = run_suite(scope, solution)
    is_script = tests == 0 and not any(is_assert for is_assert, _ in lines)
    held = [ok for is_assert, ok in lines if is_assert or is_script or not ok]
    tests, passed = tests + len(held), passed + sum(held)
    if tests == 0:
        raise ValueError("the module tests nothing")
    verdict = {
        "tests": tests, "passed": passed, "solution_ended": int(solution.has_ended),
        "spent": int(solution.is_spent and not solution.has_failed),
    }  # fmt: skip
    os.write(RESULT_FD, json.dumps(verdict).encode() + b"\n")


class Solution:
    """The other sandbox. After a call of more than `call_s`, or `budget_s` in all, it is not asked
    again.
    """

    def __init__(self, call_s: float, budget_s: float, max_bytes: int) -> None:
        self._unread = bytearray()
        self._call_s = call_s
        self._end = time.monotonic() + budget_s
        self._max_bytes = max_bytes
        self._has_overrun = False
        self.has_ended = False
        self.is_spent = False
        self.has_failed = False  # a test, before the time was spent
        self.num_calls = 0

    def note_failure(self) -> None:
        self.has_failed |= not self.is_spent

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            reply = self._ask([name, mark(arguments), mark(named)])
            if "value" in reply:
                return reply["value"]
            kind = getattr(builtins, str(reply.get("type")), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = RuntimeError
            raise kind(str(reply.get("error", "no value"))[:500])

        return call

    def _ask(self, request: list[Any]) -> dict[str, Any]:
        self.num_calls += 1
        if self._has_overrun or self.has_ended or self.is_spent:
            return {"error": "the solution has ended"}
        line = b""
        try:
            write_all(PEER_FD, json.dumps(request).encode() + b"\n")
            line = self._read_line()
        except TimeoutError:
            self.is_spent = time.monotonic() >= self._end
            self._has_overrun = not self.is_spent
            return {"error": f"no answer in {self._call_s:g} s"}
        except ConnectionError:  # it has ended with requests unread
            pass
        self.has_ended = not line
        try:
            reply: Any = json.loads(
                line or b'{"error": "the solution has ended"}',
                object_hook=unmark, parse_constant=INFINITIES.__getitem__,
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, RecursionError):
            reply = {}
        return cast("dict[str, Any]", reply) if isinstance(reply, dict) else {}

    def _read_line(self) -> bytes:
        """The next line, `{}` for one of more than `max_bytes`, nothing at the end."""
        deadline, is_long = min(self._end, time.monotonic() + self._call_s), False
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([PEER_FD], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(PEER_FD, 65536)
            if not chunk:
                return b""
            self._unread += chunk
            if len(self._unread) > self._max_bytes and b"\n" not in chunk:
                is_long = True
                self._unread.clear()
        line, _, rest = self._unread.partition(b"\n")
        self._unread = rest
        return b"{}" if is_long or not 0 < len(line) <= self._max_bytes else bytes(line)


def script(
    tree: ast.Module, scope: dict[str, Any], solution: Solution
) -> Iterator[tuple[bool, bool]]:
    """Runs the top level in order; (is an assert, has held) for each assert and each statement
    that called the solution and is an expression or failed.
    """
    for number, node in enumerate(tree.body):
        num_calls, is_line = solution.num_calls, isinstance(node, ast.Assert | ast.Expr)
        code = compile(ast.Module([node], []), "tests.py", "exec")
        try:
            exec(code, scope)
            ok = True
        except Exception:
            ok = False
            has_called = solution.num_calls > num_calls
            if not isinstance(node, ast.Assert) and not has_called:
                raise
            solution.note_failure()
        if isinstance(node, ast.Assert):
            yield True, ok
        elif not ok or (is_line and solution.num_calls > num_calls):
            yield False, ok
        if not ok and not is_line:
            rest = tree.body[number + 1 :]
            yield from ((True, False) for later in rest if isinstance(later, ast.Assert))
            return


def run_suite(scope: dict[str, Any], solution: Solution) -> tuple[int, int]:
    """(tests, passed) of test cases and `test...` functions; a skipped one is no test.

    Raises `ValueError` for a test in error that has not called the solution, when nothing outside
    of tests (the top level, `setUpClass`) has called it either: no program could pass that one.
    """
    import inspect
    import unittest

    class Outcome(unittest.TestResult):
        num_passed = 0
        num_calls = 0  # of tests that are over
        num_before = 0
        num_faults = 0

        def startTest(self, test: Any) -> None:
            super().startTest(test)
            self.num_before, self.num_faults = solution.num_calls, self._num_faults()

        def stopTest(self, test: Any) -> None:
            super().stopTest(test)
            self.num_calls += solution.num_calls - self.num_before
            if self._num_faults() > self.num_faults:
                solution.note_failure()

        def _num_faults(self) -> int:
            return len(self.failures) + len(self.errors)

        def addError(self, test: Any, err: Any) -> None:
            self._require_call(test, err)
            super().addError(test, err)

        def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
            if err is not None and not issubclass(err[0], test.failureException):
                self._require_call(test, err)
            super().addSubTest(test, subtest, err)

        def _require_call(self, test: Any, err: Any) -> None:
            if solution.num_calls == self.num_calls:
                raise ValueError(f"{test} fails by itself: {err[0].__name__}: {err[1]}")

        def addSuccess(self, test: Any) -> None:
            self.num_passed += 1

        def addExpectedFailure(self, test: Any, err: Any) -> None:
            self.num_passed += 1

    def takes_nothing(function: Callable[..., Any]) -> bool:
        try:
            inspect.signature(function).bind()
        except TypeError:
            return False
        return True

    suite = unittest.TestSuite()
    loader = unittest.defaultTestLoader
    for value in list(scope.values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            suite.addTests(loader.loadTestsFromTestCase(value))
    for name, value in list(scope.items()):
        if name.startswith("test") and callable(value) and takes_nothing(value):
            suite.addTest(unittest.FunctionTestCase(value))
    total, outcome = suite.countTestCases(), Outcome()
    suite.run(outcome)
    skipped = {id(getattr(test, "test_case", test)) for test, _ in outcome.skipped}
    return max(total - len(skipped), outcome.num_passed), outcome.num_passed


class Names(dict[str, Any]):
    """The builtins of a test module: a name that Python has not is a function of the solution."""

    def __init__(self, solution: Solution) -> None:
        super().__init__(vars(builtins))
        self._solution = solution

    def __missing__(self, name: str) -> Any:
        if name.startswith("__"):
            raise KeyError(name)
        return self._solution.function(name)
