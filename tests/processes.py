"""The processes of a run, found by what the kernel knows of them and not by what they call
themselves: every process that `hone train` starts keeps its working directory, or says the place
in its environment.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

# What a local run consists of, by a word of the command line.
KINDS = {
    "redis": "-server 127.0.0.1:",
    "gcs": "gcs_server",
    "raylet": "raylet/raylet",
    "actor": "ray::",
    "engine": "VLLM::EngineCore",
}


def processes_of(place: Path) -> dict[int, str]:
    """Process id -> command line of every living process at, below or told of `place`."""
    others = (found for found in _command_lines() if found[0] != os.getpid())
    return {pid: line for pid, line in others if _is_of(pid, place)}


def left_of(place: Path, within_s: float = 5.0) -> dict[int, str]:
    """What lives on after `within_s`: Ray's helpers take a moment after their session is over."""
    deadline = time.monotonic() + within_s
    while (left := processes_of(place)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kinds(processes: dict[int, str]) -> set[str]:
    """Which of `KINDS` are among them."""
    return {kind for kind, word in KINDS.items() if any(word in p for p in processes.values())}


def _command_lines() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        yield int(entry.name), line


def _is_of(pid: int, place: Path) -> bool:
    entry = Path("/proc") / str(pid)
    try:
        if (entry / "cwd").readlink().is_relative_to(place):
            return True
        return os.fsencode(place) in (entry / "environ").read_bytes()
    except OSError:  # ended meanwhile, or a zombie, which holds nothing
        return False
