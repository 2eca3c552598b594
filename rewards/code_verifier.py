"""The code verifier: does model-written Python pass tests that it never sees?

Invariant: the program gets inputs only; its answers are compared with the expected values outside
the sandbox, in an isolated worker, so that their size bounds no verdict. A program's own fault
scores 0, a sandbox's fault abstains.
Used as `code` in a config; the tests come with the task (`tests` of a file taskset).
"""

import asyncio
import math
import re
from functools import lru_cache
from typing import Literal

import msgspec

from cluster.errors import ConfigError, HoneError
from cluster.types import TrajectoryGroup, Verdict
from rewards.answers import after_thinking
from rewards.base import VerifierIO, abstention
from rewards.code_tests import Tests, read_tests
from rewards.golden_sets import CODE
from rewards.isolated_worker import FILE_MIB
from rewards.isolation import MEMORY_MIB
from rewards.sandbox import Limits, Tier, choose

MAX_CODE_BYTES = 64 << 10
BUDGET = 0.8  # of the verifier's time limit, for the tests of one program
WORKER = 0.95  # of the same: then a worker that has not kept the budget is killed
CHECK_CASES = "rewards.code_runs:check_cases"
RUN_TESTS = "rewards.code_runs:run_tests"
_OPEN = re.compile(r"[ \t]{0,16}```(?:python3?|py)?[ \t]{0,16}", re.I)
_CLOSE = re.compile(r"[ \t]{0,16}```[ \t]{0,16}")


class CodeVerifier:
    """Scores the share of tests that pass, or with `partial=False` 1.0 for all and else 0.0.

    Each test may take `test_timeout_s` and `memory_mib`; floats may differ by `tolerance`
    (relative or absolute). With `one_run_per_case` no case can learn of another. The tests of one
    program may take four fifths of the verifier's `timeout_s` in all: what is left then has failed
    if a case had, and the check abstains if none had. Example: a program that passes 3 of 4 cases
    scores 0.75.
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
        for name, value, most in (
            ("memory_mib", memory_mib, MEMORY_MIB), ("file_mib", file_mib, FILE_MIB)
        ):  # fmt: skip
            if value > most:
                raise ConfigError(f"{name}: at most {most}, the limit of its worker, got {value}")
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
        entry = group.task.entry
        try:
            tests = read_tests(entry)
        except ValueError as error:
            error_text = f"task {group.task.task_id}: {error}"
            return [Verdict(score=None, error=error_text) for _ in group.trajectories]
        codes = [extract_code(t.text) for t in group.trajectories]
        distinct = list(dict.fromkeys(codes))
        verdicts = await asyncio.gather(
            *(self._verdict(code, entry, tests, io) for code in distinct)
        )
        by_code = dict(zip(distinct, verdicts, strict=True))
        return [by_code[code] for code in codes]

    async def _verdict(self, code: str, entry: str, tests: Tests, io: VerifierIO) -> Verdict:
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
                raw = await io.run_isolated(
                    CHECK_CASES, self._tier, code, entry, limits, self._one_run_per_case,
                    self._tolerance, budget_s, timeout_s=limit_s,
                )  # fmt: skip
                (passed, note), total = msgspec.convert(raw, tuple[int, str]), len(tests.cases)
        except HoneError as error:
            return abstention(error)
        share = passed / total
        return Verdict(
            score=share if self._partial else float(share == 1.0),
            breakdown={"passed": float(passed), "tests": float(total)},
            evidence=f"{passed} of {total} tests" + (f", first fault: {note}" if note else ""),
        )


@lru_cache(maxsize=2)
def _tier(unsafe_ok: bool) -> Tier:
    return choose(unsafe_ok)


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
