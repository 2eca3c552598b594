"""Checks in processes that can be killed: a hung or crashing check costs its own verdict only.

Invariant: a call returns, or raises `CheckTimeout` or `CheckCrashed`, within its deadlines; the
worker of a failed call is dead before the call ends, and no worker outlives this process. Works
from any thread, with any event loop and inside a Ray actor. Owned by `rewards.rubric`, which lends
it to verifiers.
"""

import asyncio
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec

from cluster.errors import DeadlineError, HoneError
from rewards.isolated_worker import Call, Reply, frame

START_TIMEOUT_S = 60.0  # a worker's start and the import of its function
KILL_TIMEOUT_S = 10.0
MEMORY_MIB = 2048  # of address space
MAX_CALLS = 2000  # then the worker is replaced, so that leaks stay small
MAX_FRAME = 16 << 20
_replies = msgspec.msgpack.Decoder(Reply)


class CheckTimeout(DeadlineError):
    """The check did not end within its limit and was killed."""


class CheckCrashed(HoneError):
    """The check raised, ran out of memory, or its process died or could not start."""


def default_num_workers() -> int:
    return max(2, min(8, (os.cpu_count() or 2) // 2))


class IsolatedPool:
    """Worker processes made as calls need them, `num_workers` at work at a time. The replacement of
    one that will probably be killed starts early, so that no later check waits for its imports.

    Example: `await pool.run("rewards.symbolic:is_equal", "1/2", "0.5", timeout_s=2.0)`.
    """

    def __init__(self, num_workers: int | None = None, memory_mib: int = MEMORY_MIB) -> None:
        self._num_workers = num_workers or default_num_workers()
        self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="isolated")
        self._memory_mib = memory_mib
        self._idle: deque[_Worker] = deque()
        self._busy: set[_Worker] = set()
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._home_lock = threading.Lock()
        self._is_closed = False

    async def run(
        self,
        function: str,
        *args: object,
        timeout_s: float,
        on_running: Callable[[], None] | None = None,
    ) -> object:
        """The value of `"module:function"` called with plain data in a worker.

        `timeout_s` counts from the moment the worker has imported the function; `on_running` is
        called in this event loop at that moment. Raises `CheckTimeout` or `CheckCrashed`.
        """
        loop = asyncio.get_running_loop()

        def tell() -> None:
            if on_running is not None and not loop.is_closed():
                loop.call_soon_threadsafe(on_running)

        if self._is_closed:
            raise CheckCrashed(f"{function}: the worker pool is closed")
        request = frame(msgspec.msgpack.encode(Call(function, list(args), timeout_s)))
        return await loop.run_in_executor(
            self._threads, self._call, function, request, timeout_s, tell
        )

    def close(self) -> None:
        """Kill all workers; calls in progress raise `CheckCrashed`."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in [*self._busy, *self._idle]:
            worker.kill()
        self._threads.shutdown(wait=True)
        if self._home is not None:
            self._home.cleanup()

    def _call(
        self, function: str, request: bytes, timeout_s: float, tell: Callable[[], None]
    ) -> object:
        worker = self._take(function)
        is_replaced = False

        def replace() -> None:
            nonlocal is_replaced
            if not is_replaced:
                is_replaced = True
                self._replace(function)

        try:
            reply = worker.call(request, timeout_s, tell, replace)
        except (TimeoutError, EOFError) as error:
            worker.kill()
            replace()
            raise _explain(function, error, worker.last_words()) from None
        finally:
            self._busy.discard(worker)
        if worker.num_calls >= MAX_CALLS or self._is_closed:
            worker.kill()
            replace()
        elif len(self._idle) >= self._num_workers:
            worker.kill()  # it was slow, and its replacement is there already
        else:
            self._idle.append(worker)
        if reply.error:
            raise CheckCrashed(reply.error)
        return reply.value

    def _take(self, function: str) -> "_Worker":
        try:
            worker = self._idle.pop()
        except IndexError:
            try:
                worker = _Worker(self._memory_mib, self._home_dir())
            except OSError as error:
                raise CheckCrashed(f"{function}: cannot start a worker process: {error}") from error
        self._busy.add(worker)
        if self._is_closed:
            worker.kill()
        return worker

    def _replace(self, function: str) -> None:
        """Start another worker on its import; it is the last one to be taken."""
        if self._is_closed:
            return
        try:
            worker = _Worker(self._memory_mib, self._home_dir())
            worker.warm_up(function)
        except (OSError, EOFError):
            return  # the next check tries again, and says so
        self._idle.appendleft(worker)
        if self._is_closed:
            worker.kill()

    def _home_dir(self) -> str:
        """An empty directory that all workers share as home and working directory."""
        with self._home_lock:
            if self._home is None:
                self._home = tempfile.TemporaryDirectory(
                    prefix="hone-checks-", ignore_cleanup_errors=True
                )
            return self._home.name


def _explain(function: str, error: TimeoutError | EOFError, last_words: str) -> HoneError:
    if isinstance(error, TimeoutError):
        return CheckTimeout(function, str(error))
    return CheckCrashed(f"{function}: {error}" + (f" ({last_words})" if last_words else ""))


class _Worker:
    """One process and the pipes to it. Used by one thread at a time; `kill` may come from any."""

    def __init__(self, memory_mib: int, home: str) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # The worker dies with the thread that starts it; the pool's threads live until close.
        limits = (str(memory_mib), str(os.getpid()))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "rewards.isolated_worker", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(home),
            cwd=home,
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._write_fd = self._process.stdin.fileno()
        self._read_fd = self._process.stdout.fileno()
        os.set_blocking(self._write_fd, False)
        self.num_calls = 0
        self._is_warming_up = False

    def warm_up(self, function: str) -> None:
        """Let it import the function before the first call; does not wait."""
        request = frame(msgspec.msgpack.encode(Call(function, None, 0.0)))
        self._send(request, time.monotonic() + KILL_TIMEOUT_S)
        self._is_warming_up = True

    def call(
        self,
        request: bytes,
        timeout_s: float,
        tell: Callable[[], None],
        on_slow: Callable[[], None],
    ) -> Reply:
        """Raises `TimeoutError` or `EOFError` with a message; then the worker is unusable. Calls
        `on_slow` when a quarter of the time is over.
        """
        self.num_calls += 1
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            self._send(request, deadline)
            if self._is_warming_up:
                self._is_warming_up = False
                self._receive(deadline)
            reply = self._receive(deadline)
        except TimeoutError:
            raise TimeoutError(f"did not start in {START_TIMEOUT_S:g} s") from None
        if reply.error:
            return reply
        tell()
        started = time.monotonic()
        try:
            self._wait(self._read_fd, select.POLLIN, started + timeout_s / 4)
        except TimeoutError:
            on_slow()
        try:
            return self._receive(started + timeout_s)
        except TimeoutError:
            raise TimeoutError(f"killed after {timeout_s:g} s") from None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(KILL_TIMEOUT_S)

    def last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read()[-4096:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._write_fd, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._write_fd, view) :]
            except BrokenPipeError:
                raise EOFError(self._obituary()) from None

    def _receive(self, deadline: float) -> Reply:
        size = int.from_bytes(self._read(4, deadline), "little")
        if size > MAX_FRAME:
            raise EOFError(f"answered with {size} bytes, at most {MAX_FRAME} are accepted")
        try:
            return _replies.decode(self._read(size, deadline))
        except msgspec.DecodeError as error:
            raise EOFError(f"answered with something else than a reply: {error}") from None

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._read_fd, select.POLLIN, deadline)
            chunk = os.read(self._read_fd, size - len(data))
            if not chunk:
                raise EOFError(self._obituary())
            data += chunk
        return bytes(data)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError

    def _obituary(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "the worker process closed its pipe"
        return f"the worker process died of signal {-code}" if code < 0 else f"exited with {code}"


def _environment(home: str) -> dict[str, str]:
    """All that a worker sees: where modules are and a home. No variable is inherited."""
    return {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
