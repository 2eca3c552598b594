"""The worker process behind `rewards.isolation`: reads a call, runs it, answers, repeats.

Invariant: it holds no secret (its environment is built from nothing), it cannot outgrow its memory
or CPU limits, and it dies with its parent. Frames are a 4-byte little-endian length and msgpack,
never pickle. Run as `python -m rewards.isolated_worker MEMORY_MIB PARENT_PID` by `IsolatedPool`, by
nobody else.
"""

import ctypes
import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from cluster.errors import HoneError, boundary

PR_SET_PDEATHSIG = 1
FILE_MIB = 64


class Call(msgspec.Struct, frozen=True, array_like=True):
    """Without `args` the function is only imported."""

    function: str
    args: list[object] | None
    cpu_s: float


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """`ready` when the function is imported; then either a value or an error."""

    ready: bool = False
    value: object = None
    error: str = ""


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def main(memory_mib: int, parent_pid: int) -> None:
    _die_with(parent_pid)
    _limit(memory_mib)
    requests, replies = _take_pipes()
    decoder = msgspec.msgpack.Decoder(Call)
    while size := requests.read(4):
        call = decoder.decode(requests.read(int.from_bytes(size, "little")))
        for reply in (_import,) if call.args is None else (_import, _run):
            answer = reply(call)
            replies.write(frame(_encode(answer)))
            replies.flush()
            if answer.error:
                break


def _import(call: Call) -> Reply:
    try:
        with boundary(f"{call.function}: cannot import"):
            _function(call.function)
    except HoneError as error:
        return Reply(error=str(error))
    return Reply(ready=True)


def _run(call: Call) -> Reply:
    _limit_cpu(call.cpu_s)
    try:
        with boundary(call.function):
            return Reply(value=_function(call.function)(*(call.args or ())))
    except (HoneError, SystemExit) as error:
        return Reply(error=str(error) or f"{call.function}: exit")


def _function(path: str) -> Callable[..., object]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _encode(reply: Reply) -> bytes:
    try:
        return msgspec.msgpack.encode(reply)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return msgspec.msgpack.encode(
            Reply(error=f"the result of a check must be plain data: {error}")
        )


def _die_with(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _limit(memory_mib: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_FSIZE: FILE_MIB << 20,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def _limit_cpu(seconds: float) -> None:
    """SIGXCPU ends the process should the parent's own clock fail to."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to the parent; checks get an empty stdin and a stdout that goes to stderr."""
    requests, replies = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
