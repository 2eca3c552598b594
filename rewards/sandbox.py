"""Runs model-written Python so that it can neither harm the machine nor learn its own verdict.

Covered in tier `namespaces`, layer by layer: user, PID, network, IPC, UTS, cgroup and mount
namespaces; a root that holds Python, its libraries (read-only), three devices and a 32 MiB /tmp;
no capabilities, no_new_privs; Landlock; a seccomp allow list of system calls, without processes,
sockets or exec; rlimits for memory, CPU, files, threads; a keeper outside that owns the clock and
the pipes. Tier `landlock` has no namespaces, but the same lack of capabilities, Landlock, seccomp
and rlimits but that for threads, which counts all of a user's: there the keeper counts a program's
50 times a second and kills it, so that for a moment it can have more. All it can write is
/dev/null, and seccomp also denies what changes a path (no Landlock guards modes and times). `stat`
tells a program there that a path exists, not what is in it.
Both must pass `self_test` before any program runs; without either, Hone refuses, unless `unsafe_ok`
asks for tier `none` (rlimits and the keeper only: a program there can read what our user can, so
also the tests of other processes).
Any Landlock will do (version 1, Linux 5.13). What later versions add is denied by seccomp as well,
and by it alone before them: truncation (3), TCP (4), ioctls of devices (5), signals and abstract
sockets outside (6).
Not covered: a cgroup or a user of its own for each slot, kernel bugs, side channels (timing,
caches), other languages, GPUs, network access on purpose, C extensions outside the standard
library, programs that start processes (they fail).

Invariant: what comes back is data, never a verdict; expected values are never sent in. Runs inside
an isolated worker (`rewards.isolation`); called by `rewards.code_verifier` by its path.
"""

import json
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster.errors import ConfigError, HoneError

Tier = Literal["namespaces", "landlock", "none"]
TIERS: tuple[Tier, ...] = ("namespaces", "landlock")
START_S = 10.0
GRACE_S = 2.0  # of the keeper beyond the program's own limit
ESCAPED_BYTES = 6  # of JSON at the most, for a byte that a program wrote
SOLUTION_ENDED = '"solution_ended": 1'  # in the tally of a test module
_REPOSITORY = str(Path(__file__).resolve().parents[1])
_MAIN = "rewards.sandbox_zygote:main"
_ZYGOTE = "import sys; sys.path.insert(0, sys.argv[1]); from {0} import {1}; {1}()".format(
    *_MAIN.split(":")
)
log = logging.getLogger(__name__)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run. A run is stopped by whichever comes first."""

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    output_bytes: int = 64 << 10
    threads: int = 16


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """`status` ok, model_error, crash, cpu_timeout, wall_timeout, memory_limit, output_limit,
    thread_limit: the program's doing; infra_error: ours.
    """

    status: str
    stdout: str = ""
    stderr: str = ""
    result: str = ""  # what it wrote on descriptor 3: data to be distrusted
    error: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0


class SandboxError(HoneError):
    """The sandbox could not run a program; it says nothing about the program."""


class Sandbox:
    """One zygote. Example: `Sandbox("namespaces").run("program", "print(1)").stdout == "1\\n"`."""

    def __init__(self, tier: Tier) -> None:
        self.tier: Tier = tier
        self._process: subprocess.Popen[bytes] | None = None
        self._door: socket.socket | None = None

    def run(self, mode: str, code: str, limits: Limits | None = None, **fields: Any) -> RunResult:
        """One program to its end. Raises `SandboxError` when nothing can be said about it."""
        return self.start(mode, code, limits or Limits(), None, **fields).result()

    def run_tests(self, code: str, tests: str, limits: Limits, call_s: float) -> RunResult:
        """Trusted test code in one sandbox, the program in another; plain data between them.

        A call of the program may take `call_s`. Raises `SandboxError` also when it is the program's
        sandbox that failed.
        """
        longer = msgspec.structs.replace(
            limits, wall_s=limits.wall_s + GRACE_S, cpu_s=limits.cpu_s + int(GRACE_S)
        )  # the tests' clock decides
        mine, theirs = socket.socketpair()
        with mine, theirs:
            server = self.start("server", code, longer, mine)
            outcome = self.start("tests", tests, limits, theirs, call_s=call_s)
        try:
            reply = outcome.result()
            if SOLUTION_ENDED in reply.result and server.has_reply(GRACE_S):
                server.result()
            return reply
        finally:
            server.abandon()

    def start(
        self, mode: str, code: str, limits: Limits, peer: socket.socket | None, **fields: Any
    ) -> "Running":
        request = {"mode": mode, "code": code, "stdin": "", "limits": msgspec.to_builtins(limits)}
        body = json.dumps(request | fields).encode()
        ours, theirs = socket.socketpair()
        descriptors = [theirs.fileno()] + ([peer.fileno()] if peer else [])
        try:
            with theirs:
                socket.send_fds(self._open(), [b"x"], descriptors)
            running = Running(ours, limits)
            ours.settimeout(START_S)
            ours.sendall(struct.pack("<I", len(body)) + body)
        except OSError as error:
            ours.close()
            self.close()
            raise SandboxError(f"sandbox ({self.tier}): cannot start a run: {error}") from error
        return running

    def close(self) -> None:
        if self._door is not None:
            self._door.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_S)
        self._process = self._door = None

    def _open(self) -> socket.socket:
        if self._door is None or self._process is None or self._process.poll() is not None:
            self.close()
            self._door, inner = socket.socketpair()
            with inner:
                self._process = subprocess.Popen(
                    [_python(), "-I", "-S", "-W", "ignore", "-c", _ZYGOTE, _REPOSITORY,
                     str(inner.fileno()), self.tier, *_read_only()],
                    pass_fds=[inner.fileno()], env={"LANG": "C.UTF-8", "PATH": os.defpath},
                    cwd="/", stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
        return self._door


class Running:
    """A program that runs."""

    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + limits.wall_s + GRACE_S
        # Of a reply: what was printed, its result, and room for the rest of it.
        self._max_bytes = ESCAPED_BYTES * (2 * limits.output_bytes + (128 << 10))

    def result(self) -> RunResult:
        with self._connection:
            (size,) = struct.unpack("<I", self._read(4))
            if size > self._max_bytes:
                raise SandboxError(f"sandbox: a reply of {size} bytes")
            reply = msgspec.json.decode(self._read(size), type=RunResult)
        if reply.status == "infra_error":
            raise SandboxError(f"sandbox: {reply.error or 'the run did not start'}")
        return reply

    def has_reply(self, wait_s: float) -> bool:
        return bool(select.select([self._connection], [], [], wait_s)[0])

    def abandon(self) -> None:
        """The keeper sees the closed connection and kills the program."""
        self._connection.close()

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._connection], [], [], left)[0]:
                raise SandboxError("sandbox: no reply from the keeper in time")
            try:
                chunk = self._connection.recv(size - len(data))
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise SandboxError("sandbox: the keeper has died")
            data += chunk
        return bytes(data)


def choose(unsafe_ok: bool = False) -> Tier:
    """The strongest tier that works here and passes its self-test, named in the log.

    Raises `ConfigError` with what each tier lacks when none does, unless `unsafe_ok`.
    """
    faults: list[str] = []
    for tier in TIERS:
        escapes = self_test(tier)
        if not escapes:
            log.info("model-written code runs in the sandbox tier %r", tier)
            return tier
        faults.append(f"{tier}: {', '.join(escapes)}")
    if not unsafe_ok:
        raise ConfigError(
            "no sandbox contains model-written code on this machine "
            f"({'; '.join(faults)}); `unsafe_ok: true` would run it with rlimits only"
        )
    log.warning("model-written code runs WITHOUT isolation (unsafe_ok): %s", "; ".join(faults))
    return "none"


def self_test(tier: Tier) -> list[str]:
    """What of the machine a program could reach in this tier; empty when it is contained."""
    sandbox = Sandbox(tier)
    try:
        with tempfile.NamedTemporaryFile() as ours:
            probes = _PROBES.replace("PARENT", str(os.getpid())).replace("OURS", repr(ours.name))
            reply = sandbox.run("program", probes)
    except SandboxError as error:
        return [str(error)]
    finally:
        sandbox.close()
    if reply.status != "ok" or "done" not in reply.stdout:
        return [f"the self-test ended with {reply.status}: {reply.stderr[-200:]}"]
    return [line for line in reply.stdout.splitlines() if line != "done"]


def _python() -> str:
    return str(getattr(sys, "_base_executable", "") or sys.executable)


def _read_only() -> list[str]:
    """Directories that the interpreter needs: its prefix and the system's libraries."""
    prefix = os.path.realpath(sys.base_prefix)
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/local/lib"]
    return [prefix, *(p for p in libraries if os.path.isdir(p) and not p.startswith(prefix + "/"))]


_PROBES = """
import ctypes, fcntl, os, signal, socket, threading
libc = ctypes.CDLL(None, use_errno=True)

def attempt(name, action):
    try:
        worked = action()
    except (OSError, ValueError, ProcessLookupError):
        return
    if worked is not False:
        print("can", name, flush=True)

def reads(path):
    return lambda: open(path, "rb").read(1)

attempt("read /etc/passwd", reads("/etc/passwd"))
attempt("read /etc/hostname", reads("/etc/hostname"))
attempt("read /proc of others", reads("/proc/PARENT/cmdline"))
attempt("list /root", lambda: [f for f in os.listdir("/root") if f != ".pyenv"] or False)
attempt("list /home", lambda: os.listdir("/home"))
attempt("write to /", lambda: open("/canary", "w"))
attempt("write to /usr/lib", lambda: open("/usr/lib/canary", "w"))
attempt("change modes", lambda: os.chmod(OURS, 0o600))
attempt("change times", lambda: os.utime(OURS))
attempt("truncate", lambda: os.truncate(OURS, 0))
attempt("truncate by opening", lambda: os.open(OURS, os.O_TRUNC | 3))
attempt("choose who is signalled", lambda: fcntl.fcntl(0, fcntl.F_SETOWN, PARENT))
attempt("choose the signal", lambda: fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL))
attempt("open a TCP socket", lambda: socket.socket())
attempt("open a unix socket", lambda: socket.socket(socket.AF_UNIX))
attempt("start a process", os.fork)
attempt("signal others", lambda: os.kill(PARENT, 0))
attempt("ptrace", lambda: libc.ptrace(0, 0, 0, 0) == 0)
attempt("unshare", lambda: libc.unshare(0x10000000) == 0)
attempt("mount", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0)
attempt("see the environment", lambda: len(os.environ) > 3)
attempt("become root", lambda: libc.setuid(0) == 0)
attempt("exec a program", lambda: os.execv("/bin/sh", ["sh", "-c", "echo can exec; echo done"]))
print("done")
"""


_sandboxes: dict[str, Sandbox] = {}


def sandbox_of(tier: Tier) -> Sandbox:
    """This process's sandbox of a tier."""
    return _sandboxes.setdefault(tier, Sandbox(tier))
