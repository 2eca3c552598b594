"""Which part of a completion is the program, at what cost that is found, and its language."""

import time

import pytest

from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from rewards.code_verifier import extract_code
from rewards.rubric import Rubric


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\na\n```\nor\n```\nb\n  ```\nend", "b\n"),
        ("```python\na\n```\n```python\nnever closed", "a\n"),
        ("x = 1", "x = 1"),
        ("```python\nx = 1", "```python\nx = 1"),
    ],
)
def test_the_last_closed_block_is_the_program(text: str, code: str) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize("line", ["```py\n", "```py" + " " * 50 + "\n", "```\n", "`" * 50])
def test_no_completion_takes_long(line: str) -> None:
    started = time.perf_counter()
    extract_code(line * 50_000)
    assert time.perf_counter() - started < 0.5


def test_another_language_is_refused_with_those_that_are_offered() -> None:
    with pytest.raises(ConfigError, match=r"language: only 'python' is offered, got 'bash'"):
        Rubric({"tests": VerifierConfig(use="code", settings={"language": "bash"})})
