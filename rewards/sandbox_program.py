"""The inside of a sandboxed process: the ways a program can be run, and what it may answer.

Invariant: everything has been given up before anything here runs; answers are JSON lines on
descriptor 3 (or 4, between two sandboxes) and nobody outside believes them to be more than data.
Standard library only; called by `rewards.sandbox_zygote`.
"""

import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any, cast

RESULT_FD = 3
PEER_FD = 4


def load(code: str, name: str) -> dict[str, Any]:
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
        os.write(RESULT_FD, answer(scope, request["function"], arguments, {}, plain))


def plain(value: Any) -> Any:
    return value


def run_server(request: dict[str, Any]) -> None:
    """Answers calls that come as JSON lines on descriptor 4 until it is closed."""
    scope = load(request["code"], "solution")
    with os.fdopen(PEER_FD, "rb", closefd=False) as calls:
        for line in calls:
            name, arguments, named = json.loads(line, object_hook=unmark)
            write_all(PEER_FD, answer(scope, name, arguments, named, mark, is_finite=False))


def mark(value: Any) -> Any:
    """What JSON would flatten, as an object with one key: tuples, sets, keys that are no text."""
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        pairs = [[mark(key), mark(child)] for key, child in items]
        is_plain = all(isinstance(key, str) and key not in MARKS for key, _ in items)
        return dict(pairs) if is_plain else {"__dict__": pairs}
    for name, kind in MARKS.items():
        if isinstance(value, (kind, list)):
            children = [mark(child) for child in cast("list[Any]", value)]
            return children if isinstance(value, list) else {name: children}
    return value


def unmark(value: dict[str, Any]) -> Any:
    (name, *more) = value or [""]
    return MARKS[name](value[name]) if name in MARKS and not more else value


MARKS: dict[str, Any] = {
    "__tuple__": tuple, "__set__": set, "__frozenset__": frozenset, "__dict__": dict
}  # fmt: skip
MODES = {"program": run_program, "calls": run_calls, "server": run_server}


def answer(
    scope: dict[str, Any],
    name: str,
    arguments: list[Any],
    named: dict[str, Any],
    convert: Callable[[Any], Any],
    is_finite: bool = True,
) -> bytes:
    try:
        value = (
            scope[name](*arguments, **named)
            if name in scope
            else scope["Solution"]().__getattribute__(name)(*arguments, **named)
        )
        return json.dumps({"value": convert(value)}, allow_nan=not is_finite).encode() + b"\n"
    except MemoryError:
        raise
    except Exception as error:
        reply = {"type": type(error).__name__, "error": f"{type(error).__name__}: {error}"[:500]}
        return json.dumps(reply).encode() + b"\n"


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
