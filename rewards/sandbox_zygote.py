"""A warm interpreter that forks one process per run; started by `rewards.sandbox`.

Invariant: it never holds a program, an input or an expected value: a run's request is read by the
run's own processes. Per run there are two: a keeper outside the new PID namespace, which owns the
clock, the pipes and the reply, and the program inside, whose word on anything is only data. What a
run cannot leave anything in (user, network, root) is entered once. Standard library only.
"""

import array
import bisect
import collections
import datetime
import decimal
import fractions
import functools
import gc
import heapq
import itertools
import json
import math
import operator
import os
import random
import re
import resource
import select
import signal
import socket
import statistics
import string
import struct
import sys
import time
import typing
from typing import Any

from rewards import sandbox_kernel as kernel
from rewards.sandbox_program import MODES, PEER_FD, RESULT_FD, write_all
from rewards.sandbox_suite import run_tests

WARM = (bisect, datetime, decimal, fractions, functools, heapq, itertools, math, operator, random,
        re, statistics, string, typing, collections)  # fmt: skip
MAX_REQUEST = 8 << 20
READY = b"R"
TICK_S = 0.02  # between two looks at the clock and the threads
OUR_PROCESSES = 6  # of a slot, counted with a program's threads: zygote, two keepers, two programs


def serve(door: socket.socket, tier: str, roots: list[str]) -> None:
    """One connection per run: fork, and let the child read the request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    kernel.die_with_parent()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    fault = enter(tier, roots)
    gc.collect()
    gc.freeze()
    while True:
        data, control, _, _ = door.recvmsg(1, socket.CMSG_SPACE(2 * 4))
        if not data:
            return
        descriptors = array.array("i")
        for _, _, body in control:
            descriptors.frombytes(body[: len(body) - len(body) % 4])
        if os.fork() == 0:
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            peer = descriptors[1] if len(descriptors) > 1 else -1
            keep(descriptors[0], peer, tier, roots, fault)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def enter(tier: str, roots: list[str]) -> str:
    """The shared part of the isolation; what the kernel refused, or ""."""
    try:
        if tier == "namespaces":
            kernel.enter_slot(roots)
            kernel.die_with_parent()  # a change of user had cleared it
        if tier != "none":
            kernel.seccomp_program(tier)
    except OSError as problem:
        return str(problem)
    return ""


def keep(connection: int, peer: int, tier: str, roots: list[str], fault: str) -> None:
    """The keeper of one run: isolate, fork the program, collect what it writes, reply."""
    kernel.die_with_parent()
    request = json.loads(read_frame(connection))
    pipes = {name: os.pipe() for name in ("stdin", "stdout", "stderr", "result", "setup")}
    pid, error = -1, fault
    try:
        if tier == "namespaces" and not fault:
            kernel.enter_run(2 * request["limits"]["file_bytes"], 512)
        pid = -1 if fault else os.fork()
    except OSError as problem:
        error = str(problem)
    if pid == 0:
        os.close(connection)
        for name in ("stdout", "stderr", "result", "setup"):
            os.close(pipes[name][0])
        os.close(pipes["stdin"][1])
        run(request, {k: v[0 if k == "stdin" else 1] for k, v in pipes.items()}, peer, tier, roots)
        os._exit(0)
    for name in ("stdout", "stderr", "result", "setup"):
        os.close(pipes[name][1])
    os.close(pipes["stdin"][0])
    if peer >= 0:
        os.close(peer)
    reply = (
        {"status": "infra_error", "error": error}
        if pid < 0
        else collect(pid, connection, request, pipes)
    )
    body = json.dumps(reply).encode()
    os.set_blocking(connection, True)
    try:
        write_all(connection, struct.pack("<I", len(body)) + body)
    except BrokenPipeError:
        os._exit(1)  # nobody waits for the answer any more


def collect(
    pid: int, connection: int, request: dict[str, Any], pipes: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """Everything the program wrote, up to its limits, and how it ended by the keeper's clock."""
    limits, started = request["limits"], time.monotonic()
    deadline = started + limits["wall_s"]
    most = limits["output_bytes"]
    caps = {"stdout": most, "stderr": 16384, "result": most, "setup": 4096}
    sources = {pipes[name][0]: name for name in caps}
    kept = {name: bytearray() for name in caps}
    feed, data = pipes["stdin"][1], memoryview(request["stdin"].encode())
    os.set_blocking(feed, False)
    poll = select.poll()
    for descriptor in sources:
        poll.register(descriptor, select.POLLIN)
    poll.register(connection, 0)  # POLLHUP: nobody waits for the answer any more
    poll.register(feed, select.POLLOUT)
    is_feeding, why = True, ""
    while sources and not (why := why or overrun(pid, deadline, limits["threads"])):
        for descriptor, events in poll.poll(TICK_S * 1000):
            if descriptor == connection:
                why = "abandoned"
            elif descriptor == feed:
                try:
                    data = data[os.write(feed, data[:65536]) :] if data else data
                except (BrokenPipeError, BlockingIOError):
                    data = data if events & select.POLLOUT else data[:0]
                    if events & (select.POLLERR | select.POLLHUP):
                        data = data[:0]
                if is_feeding and not data:
                    is_feeding = False
                    poll.unregister(feed)
                    os.close(feed)
            else:
                name = sources[descriptor]
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    poll.unregister(descriptor)
                    del sources[descriptor]
                kept[name] += chunk
                if len(kept[name]) > caps[name]:
                    if name == "stderr":
                        del kept[name][: -caps[name]]
                    else:
                        why = "output_limit"
    if why:
        os.kill(pid, signal.SIGKILL)
    status, usage, late = wait(pid, deadline, limits["threads"])
    why = why or late
    for descriptor, name in sources.items():  # what a killed program had answered already
        if name == "result" and select.select([descriptor], [], [], 0)[0]:
            kept[name] += os.read(descriptor, 65536)
    cpu_s = usage.ru_utime + usage.ru_stime
    for name in ("stdout", "result"):
        del kept[name][caps[name] :]
    return {
        "status": classify(
            why, status, cpu_s >= limits["cpu_s"], bytes(kept["setup"]), bytes(kept["stderr"])
        ),
        "stdout": kept["stdout"].decode("utf-8", "replace"),
        "stderr": kept["stderr"][-4096:].decode("utf-8", "replace"),
        "result": kept["result"].decode("utf-8", "replace"),
        "error": kept["setup"].decode("utf-8", "replace").removeprefix("R")
        or ("killed from outside" if os.WIFSIGNALED(status) and not why else ""),
        "wall_s": time.monotonic() - started,
        "cpu_s": cpu_s,
    }


def wait(pid: int, deadline: float, threads: int) -> tuple[int, resource.struct_rusage, str]:
    """Its pipes are closed: it ends now, or is killed for what it overran."""
    ended, why = os.pidfd_open(pid), ""
    while not why and not select.select([ended], [], [], TICK_S)[0]:
        why = overrun(pid, deadline, threads)
    if why:
        os.kill(pid, signal.SIGKILL)
    os.close(ended)
    _, status, usage = os.wait4(pid, 0)
    return status, usage, why


def overrun(pid: int, deadline: float, threads: int) -> str:
    if time.monotonic() >= deadline:
        return "wall_timeout"
    return "thread_limit" if kernel.num_threads(pid) > 1 + threads else ""


def classify(why: str, status: int, used_up_cpu: bool, setup: bytes, stderr: bytes) -> str:
    """A SIGKILL that neither the keeper nor the CPU limit sent (out of memory) is no fault of the
    program's.
    """
    if setup != READY:
        return "infra_error"
    if why:
        return why
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGKILL and not used_up_cpu:
            return "infra_error"
        return "cpu_timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    if os.WEXITSTATUS(status) == 0:
        return "ok"
    return "memory_limit" if b"MemoryError" in stderr[-200:] else "model_error"


def run(
    request: dict[str, Any], ends: dict[str, int], peer: int, tier: str, roots: list[str]
) -> None:
    """The program's process: give everything up, say so, then run it."""
    try:
        kernel.die_with_parent()
        os.setsid()
        for target, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            os.dup2(ends[name], target)
        setup = move(ends["setup"], 20)
        result = move(ends["result"], 21)
        peer = move(peer, 22) if peer >= 0 else -1
        os.closerange(3, 20)
        os.closerange(23, 4096)
        isolate(request["limits"], tier, roots)
        os.dup2(result, RESULT_FD)
        if peer >= 0:
            os.dup2(peer, PEER_FD)
        os.write(setup, READY)
    except OSError as problem:
        os.write(20, str(problem).encode())
        os._exit(1)
    os.closerange(5 if peer >= 0 else 4, 64)
    sys.argv = ["solution.py"]
    (MODES | {"tests": run_tests})[request["mode"]](request)
    sys.stdout.flush()
    sys.stderr.flush()


def isolate(limits: dict[str, Any], tier: str, roots: list[str]) -> None:
    writable = ["/tmp"] if tier == "namespaces" else []
    os.chdir("/tmp" if writable else "/")
    os.environ.clear()
    os.environ.update({"HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"})
    kernel.set_limits(limits["memory_bytes"], limits["cpu_s"], limits["file_bytes"],
                      OUR_PROCESSES + limits["threads"] if tier == "namespaces" else 0)  # fmt: skip
    if tier == "none":
        return
    kernel.drop_capabilities()
    kernel.no_new_privileges()
    kernel.enter_landlock([*roots, "/dev/zero", "/dev/urandom"], [*writable, "/dev/null"])
    kernel.enter_seccomp(tier)


def move(descriptor: int, target: int) -> int:
    os.dup2(descriptor, target)
    return target


def read_frame(connection: int) -> bytes:
    (size,) = struct.unpack("<I", read_all(connection, 4))
    if size > MAX_REQUEST:
        os._exit(1)
    return read_all(connection, size)


def read_all(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, size - len(data))
        if not chunk:
            os._exit(1)
        data += chunk
    return bytes(data)


def main() -> None:
    """`main()` of a fresh interpreter: arguments are the repository, the door, the tier, roots."""
    repository, door, tier, *roots = sys.argv[1:]
    sys.path.remove(repository)
    serve(socket.socket(fileno=int(door)), tier, roots)
