"""What rows of `benchmarks.show` are made of: tests with their figures, and timed commands.

Invariant: a test proves a row only if it ran and passed; a figure comes from the test's own
`record_property`.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.show import Row, judged

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Tested:
    """One pytest run: how many passed and failed, and the largest value of each figure."""

    num_passed: int
    num_not_passed: int
    figures: dict[str, float]

    @property
    def is_green(self) -> bool:
        return self.num_passed > 0 and self.num_not_passed == 0


def run_tests(nodes: Sequence[str], timeout_s: float = 900.0) -> Tested:
    """Run pytest `nodes` ("tests/unit/test_x.py::test_y") in a process of their own."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report.name}", *nodes],
            cwd=ROOT, timeout=timeout_s, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        text = Path(report.name).read_text()
    if not text:
        return Tested(0, 1, {})
    figures: dict[str, float] = {}
    num_passed = num_not_passed = 0
    for case in ElementTree.fromstring(text).iter("testcase"):
        is_passed = not {child.tag for child in case} & {"failure", "error", "skipped"}
        num_passed += is_passed
        num_not_passed += not is_passed
        for prop in case.iter("property"):
            value = float(prop.attrib["value"])
            figures[prop.attrib["name"]] = max(value, figures.get(prop.attrib["name"], value))
    return Tested(num_passed, num_not_passed, figures)


def proven(
    claim: str, nodes: Sequence[str], bound: str, limits: Mapping[str, float] | None = None
) -> Row:
    """A row held by tests: all pass, and each recorded figure named in `limits` is at most that."""
    result = run_tests(nodes)
    limits = limits or {}
    measured = [f"{result.num_passed} tests passed, {result.num_not_passed} not"]
    measured += [f"{name} {result.figures.get(name, float('nan')):.3g}" for name in limits]
    within = all(result.figures.get(name, float("inf")) <= top for name, top in limits.items())
    return judged(claim, "; ".join(measured), bound, result.is_green and within)


@dataclass(frozen=True)
class Timed:
    """A finished command: exit code, seconds to its first output and to its end, its output."""

    code: int
    first_s: float
    total_s: float
    output: str


def run_timed(command: Sequence[str], cwd: Path, timeout_s: float) -> Timed:
    """Run `command`; past `timeout_s` it is ended and its code is not 0."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    first_s = time.monotonic() - started
    try:
        rest, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        rest, _ = process.communicate()
    return Timed(process.returncode, first_s, time.monotonic() - started, first + rest)
