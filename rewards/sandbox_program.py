"""The inside of a sandboxed process: the ways a program can be run, and what it may answer.

Invariant: everything has been given up before anything here runs; answers are JSON lines on
descriptor 3 (or 4, between two sandboxes) and nobody outside believes them to be more than data.
Standard library only; called by `rewards.sandbox_zygote`.
"""

import ast
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

RESULT_FD = 3
PEER_FD = 4


def load(code: str | ast.Module, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    module.__dict__["__name__"] = name
    sys.modules[name] = module
    exec(compile(code, "solution.py", "exec"), module.__dict__)
    return module.__dict__


def run_program(request: dict[str, Any]) -> None:
    load(request["code"], "__main__")


def run_calls(request: dict[str, Any]) -> None:
    """One JSON line per call on descriptor 3: `{"value": ...}` or `{"error": ...}`."""
    scope = load(request["code"], "solution")
    for arguments in request["calls"]:
        os.write(RESULT_FD, answer(scope, request["function"], arguments))


def run_server(request: dict[str, Any]) -> None:
    """Answers calls that come as JSON lines on descriptor 4 until it is closed."""
    scope = load(request["code"], "solution")
    with os.fdopen(PEER_FD, "rb", closefd=False) as calls:
        for line in calls:
            name, arguments = json.loads(line)
            write_all(PEER_FD, answer(scope, name, arguments))


def run_tests(request: dict[str, Any]) -> None:
    """Trusted tests against `solution`, whose functions live in another sandbox.

    Counts the methods of test cases, `test...` functions, and asserts at the top level, which need
    not import what they call.
    """
    calls = os.fdopen(PEER_FD, "rb", closefd=False)

    def remote(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            write_all(PEER_FD, json.dumps([name, arguments]).encode() + b"\n")
            line = calls.readline(request["limits"]["output_bytes"])
            reply = json.loads(line) if line else {"error": "the solution has ended"}
            if "value" not in reply:
                raise RuntimeError(str(reply.get("error", "no value"))[:500])
            return reply["value"]

        return call

    module = types.ModuleType("solution")
    module.__getattr__ = remote  # type: ignore[method-assign]
    sys.modules["solution"] = module
    import unittest

    tree = ast.parse(request["code"])
    asserts = [node for node in tree.body if isinstance(node, ast.Assert)]
    tree.body = [node for node in tree.body if not isinstance(node, ast.Assert)]
    scope = load(tree, "tests")
    suite = unittest.TestSuite()
    loader = unittest.defaultTestLoader
    for value in list(scope.values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            suite.addTests(loader.loadTestsFromTestCase(value))
    for name, value in list(scope.items()):
        if name.startswith("test") and callable(value):
            suite.addTest(unittest.FunctionTestCase(value))
    outcome = unittest.TestResult()
    suite.run(outcome)
    bad = len(outcome.failures) + len(outcome.errors) + len(outcome.unexpectedSuccesses)
    passed = [holds(line, scope, remote) for line in asserts]
    verdict = {
        "tests": outcome.testsRun + len(asserts),
        "passed": outcome.testsRun - bad + sum(passed),
    }
    os.write(RESULT_FD, json.dumps(verdict).encode() + b"\n")


class Names(dict[str, Any]):
    """Names that no test defines are functions of the solution."""

    def __init__(self, scope: dict[str, Any], remote: Callable[[str], Any]) -> None:
        super().__init__(scope)
        self._remote = remote
        self._builtins = scope["__builtins__"]

    def __missing__(self, name: str) -> Any:
        if name in self._builtins:
            raise KeyError(name)
        return self._remote(name)


def holds(line: ast.Assert, scope: dict[str, Any], remote: Callable[[str], Any]) -> bool:
    code = compile(ast.Module([line], []), "tests.py", "exec")
    try:
        exec(code, scope, Names(scope, remote))
    except Exception:
        return False
    return True


MODES = {"program": run_program, "calls": run_calls, "server": run_server, "tests": run_tests}


def answer(scope: dict[str, Any], name: str, arguments: list[Any]) -> bytes:
    try:
        value = (
            scope[name](*arguments)
            if name in scope
            else scope["Solution"]().__getattribute__(name)(*arguments)
        )
        return json.dumps({"value": value}, allow_nan=False).encode() + b"\n"
    except MemoryError:
        raise
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode() + b"\n"


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
