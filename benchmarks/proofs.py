"""What rows of `benchmarks.show` are made of: tests with their figures, and timed commands.

Invariant: a test proves a row only if it ran and passed; a figure comes from the test's own
`record_property`.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.show import Row, judged

ROOT = Path(__file__).parents[1]
TESTS_S = 3600.0  # of one row: the longest tests have 1800 s themselves
END_S = 60.0  # from Ctrl-C until a process group is killed
FETCH_S = 300.0  # of a tool
READ_S = 5.0  # for the last output of a process that has ended


@dataclass(frozen=True)
class Tested:
    """One pytest run: how many passed and failed, and the largest value of each figure."""

    num_passed: int
    num_not_passed: int
    figures: dict[str, float]
    why: str = ""  # what ended them early

    @property
    def is_green(self) -> bool:
        return self.num_passed > 0 and self.num_not_passed == 0


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
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report.name}", *nodes],
            cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        is_late = finish(process, timeout_s)
        text = Path(report.name).read_text()
    why = f"ended after {timeout_s:g} s" if is_late else ""
    if not text:
        return Tested(0, 1, {}, why)
    figures: dict[str, float] = {}
    num_passed = num_not_passed = 0
    for case in ElementTree.fromstring(text).iter("testcase"):
        is_passed = not {child.tag for child in case} & {"failure", "error", "skipped"}
        num_passed += is_passed
        why = why or next((c.get("message", "") for c in case if c.tag in ("failure", "error")), "")
        num_not_passed += not is_passed
        for prop in case.iter("property"):
            value = float(prop.attrib["value"])
            figures[prop.attrib["name"]] = max(value, figures.get(prop.attrib["name"], value))
    if (is_late or process.returncode != 0) and num_not_passed == 0:
        num_not_passed = 1  # one that was broken off, or could not be collected
    return Tested(num_passed, num_not_passed, figures, " ".join(why.split())[:300])


def proven(
    claim: str, nodes: Sequence[str], bound: str, limits: Mapping[str, float] | None = None
) -> Row:
    """A row held by tests: all pass, and each recorded figure named in `limits` is at most that."""
    result = run_tests(nodes)
    limits = limits or {}
    measured = [f"{result.num_passed} tests passed, {result.num_not_passed} not"]
    measured += [f"{name} {result.figures.get(name, float('nan')):.3g}" for name in limits]
    within = all(result.figures.get(name, float("inf")) <= top for name, top in limits.items())
    return judged(claim, "; ".join(measured), bound, result.is_green and within, result.why)


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
