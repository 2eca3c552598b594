"""What a program may answer to a call: plain data, not too deep, told from the text it is in."""

import json

import pytest

from rewards.code_runs import MAX_DEPTH, read_answers
from rewards.code_tests import read_tests
from rewards.sandbox import RunResult


def answer(value: object) -> tuple[str, str]:
    reply = RunResult(status="ok", result=json.dumps({"value": value}) + "\n")
    (only,) = read_answers(reply, 1)
    return only


def nested(depth: int) -> object:
    value: object = 1
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


@pytest.mark.parametrize("text", ["[" * 99, "{[" * 99, "]" * 99 + "[" * 99, '\\"[' * 99])
def test_brackets_inside_text_are_text(text: str) -> None:
    for value in (text, [text], {text: text}):
        status, printed = answer(value)
        assert (status, json.loads(printed)) == ("ok", value)


def test_nesting_is_bounded_whatever_its_text_says() -> None:
    deepest = nested(MAX_DEPTH - 1)  # the line's own object is one level
    assert answer(deepest) == ("ok", json.dumps(deepest, separators=(",", ":")))
    for value in (nested(MAX_DEPTH), ["]" * 99, nested(MAX_DEPTH)], nested(300)):
        assert answer(value) == ("result_invalid", "")


def test_a_line_too_deep_to_be_read_is_invalid() -> None:
    line = '{"value": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    assert read_answers(RunResult(status="ok", result=line), 1) == [("result_invalid", "")]


def test_only_whole_lines_are_answers_and_too_many_spoil_all() -> None:
    cut = RunResult(status="output_limit", result='{"value": 1}\n{"value": 22')
    assert read_answers(cut, 3) == [("ok", "1")]
    more = RunResult(status="ok", result='{"value": 1}\n' * 3)
    assert read_answers(more, 2) == [("result_invalid", "")] * 2


def test_a_case_too_large_for_the_sandbox_is_named_at_load() -> None:
    large = {"function": "f", "cases": [{"args": ["x" * (7 << 20)], "expected": 1}]}
    with pytest.raises(ValueError, match="at most 7 MiB"):
        read_tests(json.dumps({"tests": large}))
    some = {"function": "f", "cases": [{"args": ["x" * (3 << 20)], "expected": 1}] * 3}
    assert len(read_tests(json.dumps({"tests": some})).cases) == 3
