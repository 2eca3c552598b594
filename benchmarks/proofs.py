"""What rows of `benchmarks.show` are made of: tests with their figures, and timed commands.

Invariant: a test proves a row only if it ran and passed, and one that was skipped leaves it open; a
figure comes from the test's own `record_property`.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.show import Row, judged

ROOT = Path(__file__).parents[1]
TESTS_S = 3600.0  # of one row: the longest tests have 1800 s themselves
NOTHING_RUN = 5  # pytest's exit code, also where whole modules were skipped
END_S = 60.0  # from Ctrl-C until a process group is killed
FETCH_S = 300.0  # of a tool
READ_S = 5.0  # for the last output of a process that has ended


@dataclass(frozen=True)
class Tested:
    """Tests of one pytest run: how many passed, failed and were skipped, and the largest value of
    each figure.
    """

    num_passed: int
    num_not_passed: int
    num_skipped: int
    figures: dict[str, float]
    why: str = ""  # what ended them early, or the first failure, or why one was skipped

    @classmethod
    def of(cls, cases: Sequence[ElementTree.Element], why: str = "") -> "Tested":
        """What a JUnit report says of `cases`; `why` goes before what they say themselves."""
        failed = [child for case in cases for child in case if child.tag in ("failure", "error")]
        skipped = [child for case in cases for child in case if child.tag == "skipped"]
        num_failed = sum(any(child in failed for child in case) for case in cases)
        num_skipped = sum(any(child in skipped for child in case) for case in cases)
        figures: dict[str, float] = {}
        for prop in (prop for case in cases for prop in case.iter("property")):
            name, value = prop.attrib["name"], float(prop.attrib["value"])
            figures[name] = max(value, figures.get(name, value))
        reasons = [child.get("message", "") for child in failed]
        reasons += [child.text or "" for child in skipped]  # with its place, as for whole modules
        why = why or next(iter(reasons), "")
        num_passed = len(cases) - num_failed - num_skipped
        return cls(num_passed, num_failed, num_skipped, figures, " ".join(why.split())[:300])

    @property
    def is_green(self) -> bool:
        return self.num_passed > 0 and self.num_not_passed == self.num_skipped == 0

    @property
    def is_left_open(self) -> bool:
        """Nothing failed, but something could not be tried here."""
        return self.num_skipped > 0 and self.num_not_passed == 0

    def __str__(self) -> str:
        counts = f"{self.num_passed} tests passed, {self.num_not_passed} not"
        return counts + (f", {self.num_skipped} skipped" if self.num_skipped else "")


class Claim(NamedTuple):
    """What tests hold, and the figures of theirs that have a largest value."""

    claim: str
    nodes: Sequence[str]
    bound: str
    limits: Mapping[str, float] = {}


def put_on_path(script: str, *tools: str) -> str:
    """What `scripts/<script>` fetches, for this process and those that it starts; the reason where
    that cannot be.
    """
    if all(shutil.which(tool) for tool in tools):
        return ""
    fetched = run_timed([ROOT / "scripts" / script], ROOT, FETCH_S)
    last = (fetched.output.strip() or "no output").splitlines()[-1]
    if fetched.code != 0:
        return f"scripts/{script}: {last}"
    os.environ["PATH"] += f"{os.pathsep}{last}"
    return ""


def run_tests(nodes: Sequence[str], timeout_s: float = TESTS_S) -> Tested:
    """Run pytest `nodes` ("tests/unit/test_x.py::test_y") in a process of their own."""
    cases, code, why = _reported(nodes, timeout_s)
    found = Tested.of(cases, why)
    is_whole = code == 0 or (code == NOTHING_RUN and found.num_skipped > 0)
    if (why or not is_whole) and found.num_not_passed == 0:
        return replace(found, num_not_passed=1)  # broken off, or could not be collected
    return found


def run_each(nodes: Sequence[str], timeout_s: float) -> dict[str, list[ElementTree.Element]]:
    """Run pytest `nodes`, single tests, in one process, in which they share fixtures of a module;
    what it reports of each. One that did not come to its end has a failure that says so.
    """
    cases, code, why = _reported(nodes, timeout_s)
    found = {node: [case for case in cases if _is_of(case, node)] for node in nodes}
    for own in found.values():
        if not own:
            own.append(case := ElementTree.Element("testcase"))
            message = why or f"not run: pytest ended with {code}"
            ElementTree.SubElement(case, "error", message=message)
    return found


def _reported(nodes: Sequence[str], timeout_s: float) -> tuple[list[ElementTree.Element], int, str]:
    """The cases of a pytest run, its exit code, and what ended it early."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report.name}", *nodes],
            cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        is_late = finish(process, timeout_s)
        text = Path(report.name).read_text()
    cases = list(ElementTree.fromstring(text).iter("testcase")) if text else []
    return cases, process.returncode, f"ended after {timeout_s:g} s" if is_late else ""


def _is_of(case: ElementTree.Element, node: str) -> bool:
    """`classname` is the module with its folders."""
    path, _, name = node.partition("::")
    module = case.get("classname", "").rpartition(".")[2]
    return (module, case.get("name", "").partition("[")[0]) == (Path(path).stem, name)


def proven(
    claim: str, nodes: Sequence[str], bound: str, limits: Mapping[str, float] | None = None
) -> Row:
    """A row held by tests: all pass, and each recorded figure named in `limits` is at most that."""
    return _held(Claim(claim, nodes, bound, limits or {}), run_tests(nodes))


def proven_together(claims: Sequence[Claim]) -> Iterator[Row]:
    """A row each, after one pytest run for all, so that what single tests of a module share is made
    once.
    """
    nodes = [node for claim in claims for node in claim.nodes]
    cases = run_each(nodes, TESTS_S * len(claims))
    for claim in claims:
        yield _held(claim, Tested.of([case for node in claim.nodes for case in cases[node]]))


def _held(claim: Claim, result: Tested) -> Row:
    measured = [str(result)]
    measured += [f"{name} {result.figures.get(name, float('nan')):.3g}" for name in claim.limits]
    within = all(result.figures.get(name, math.inf) <= top for name, top in claim.limits.items())
    if any(result.figures.get(name, 0.0) > top for name, top in claim.limits.items()):
        return judged(claim.claim, "; ".join(measured), claim.bound, False, result.why)
    return row_of(claim.claim, result, "; ".join(measured), claim.bound, within)


def row_of(claim: str, result: Tested, measured: str, bound: str, is_within: bool) -> Row:
    """A row that also asks for `is_within`; what was skipped is not shown here."""
    if result.is_left_open:
        return Row(claim, measured, bound, "not shown here", result.why)
    return judged(claim, measured, bound, result.is_green and is_within, result.why)


@dataclass(frozen=True)
class Timed:
    """A finished command: exit code, seconds to its first output and to its end, its output."""

    code: int
    first_s: float
    total_s: float
    output: str


def run_timed(command: Sequence[str | Path], cwd: Path, timeout_s: float) -> Timed:
    """Run `command`; past `timeout_s` it is ended and its code is not 0."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    arrivals: list[float] = []
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            arrivals.append(time.monotonic() - started)
            lines.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    is_late = finish(process, timeout_s)
    total_s = time.monotonic() - started
    reader.join(READ_S)  # a process of another group may hold the pipe for ever
    code = process.returncode or int(is_late)
    return Timed(code, arrivals[0] if arrivals else total_s, total_s, "".join(lines))


def finish(process: "subprocess.Popen[Any]", timeout_s: float) -> bool:
    """Wait for `process`, which leads its group; past `timeout_s`, or when this wait is broken
    off, end the group. Returns whether it was late.
    """
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        end(process)
        return True
    except BaseException:
        end(process)
        raise
    return False


def end(process: "subprocess.Popen[Any]") -> None:
    """Ctrl-C for the whole group that `process` leads, and after `END_S` seconds kill it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_S)
