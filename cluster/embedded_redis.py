"""A private Redis server for one run, so that a laptop needs nothing beside Python packages.

Invariant: the server listens on loopback only, asks for a random password that no command line
shows, and dies with the process that started it, even by kill -9; its data directory serves one
server at a time and keeps its data across restarts. Started by the run when `buffer.url` is unset.
"""

# pyright: reportUnknownMemberType=false

import fcntl
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.errors import ConfigError, DeadlineError, StageError
from cluster.redis_client import OUTAGE_S
from cluster.redis_program import server_program

_STAGE = "embedded redis"
_POLL_S = 0.02
_ANSWER_S = 3.0  # of one that runs
_START_S = 60.0
_TRY_S = 10.0  # of a start that may be given up in between
_LOCK_DEADLINE_S = 10.0  # for a server that is about to end
_STOP_DEADLINE_S = 5.0
_LAUNCH_DEADLINE_S = 10.0
_CONF = "redis.conf"
_LOG_NAME = "redis.log"
_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
protected-mode yes
daemonize no
logfile {log}
appendonly yes
appendfsync everysec
aof-load-truncated yes
save ""
maxmemory-policy noeviction
"""
# Becomes the server after asking the kernel for SIGTERM when the parent dies. A program of its own,
# because Python code between fork and exec may deadlock in a process with threads.
_LAUNCHER = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

_log = logging.getLogger(__name__)


class EndedError(StageError):
    """The server process is gone."""


class EmbeddedRedis:
    """One server on one data directory.

    Example: `with EmbeddedRedis(run_dir / "redis") as server: connect(server.url)`. When the server
    has died, `start` brings it back with its data, at the same address: its clients know no other.
    """

    def __init__(self, data_dir: Path, is_unwanted: Callable[[], bool] = lambda: False) -> None:
        self._is_unwanted = is_unwanted  # asked while it loads its data
        self._data_dir = data_dir
        self._password = secrets.token_urlsafe(24)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server; raises `StageError` when none runs."""
        return self._running().pid

    @property
    def url(self) -> str:
        """`redis://:password@127.0.0.1:port/0` of the running server."""
        self._running()
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def start(self, deadline_s: float = _START_S) -> str:
        """Start the server, wait until it has loaded its data, and return its URL.

        Raises `ConfigError` without a server program or with one already on the directory, and
        `DeadlineError` when it does not answer in `deadline_s`, or its port is taken for so long:
        one that was launched goes on loading then, and the next `start` waits for it. The cause of
        the error is the last answer: `redis.TimeoutError` for none at all.
        """
        deadline = time.monotonic() + deadline_s
        if self._process is not None and self._process.poll() is None:
            with suppress(EndedError):  # a killed one may take a moment to be gone
                self._wait_until_ready(deadline, deadline_s)  # slow is not dead
                return self.url
        program = server_program()
        self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self._lock(min(deadline, time.monotonic() + _LOCK_DEADLINE_S))
        try:
            self._choose_port(deadline)
            self._write_config()
            self._process = self._launch(program, lock)
        finally:
            os.close(lock)
        self._wait_until_ready(deadline, deadline_s)
        return self.url

    def stop(self) -> None:
        """End the server, its data on disk; by force after 5 s. May be called again."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            _log.warning("server %d did not end in %.0f s: killed", process.pid, _STOP_DEADLINE_S)
            process.kill()
            process.wait(_STOP_DEADLINE_S)

    def kill(self) -> None:
        """Kill -9, for one that hangs; `start` brings it back with its data."""
        self._running().kill()

    def __enter__(self) -> Self:
        """Also one that loads for long, as long as a run would wait for it."""
        started = time.monotonic()
        try:
            while True:
                try:
                    self.start(_TRY_S)
                    return self
                except DeadlineError as error:
                    is_loading = isinstance(error.__cause__, redis.BusyLoadingError)
                    waited_s = time.monotonic() - started
                    if self._is_unwanted() or waited_s > (OUTAGE_S if is_loading else _START_S):
                        raise
                    _log.warning("Redis is not up yet after %.0f s: %s", waited_s, error)
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise StageError(_STAGE, "the server must be started first, none is running")
        return self._process

    def _lock(self, deadline: float) -> int:
        """The lock on the directory: the server inherits it and holds it while it lives."""
        lock = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise ConfigError(
                        f"{self._data_dir} must serve one Redis at a time, and another one runs "
                        "on it: end that run or choose another run.name"
                    ) from None
                time.sleep(_POLL_S)

    def _choose_port(self, deadline: float) -> None:
        """Once and for all; what has taken it since a server died is waited for."""
        self._port = self._port or _free_port()
        while not _is_free(self._port):
            if time.monotonic() > deadline:
                raise DeadlineError(
                    _STAGE,
                    f"another program has taken port {self._port} of 127.0.0.1, the one that the "
                    "run's processes know: end it, then --resume",
                )
            time.sleep(_POLL_S)

    def _write_config(self) -> None:
        """Whole or not at all: others read it at any time (`url_in`)."""
        temporary = self._data_dir / f".{_CONF}.tmp"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(_CONFIG.format(port=self._port, password=self._password, log=_LOG_NAME))
        temporary.replace(self._data_dir / _CONF)

    def _launch(self, program: Path, lock: int) -> subprocess.Popen[bytes]:
        """Launch from a thread that outlives the server: the kernel ties a child to its thread."""
        launched: Future[subprocess.Popen[bytes]] = Future()

        def launch_and_wait() -> None:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), program, _CONF],
                    cwd=self._data_dir,
                    pass_fds=[lock],
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:
                launched.set_exception(error)
                return
            launched.set_result(process)
            with suppress(ChildProcessError):  # it has ended and was collected
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        threading.Thread(target=launch_and_wait, name="embedded-redis", daemon=True).start()
        return launched.result(timeout=_LAUNCH_DEADLINE_S)

    def _wait_until_ready(self, deadline: float, deadline_s: float) -> None:
        while (reason := self._refusal()) is not None:
            if self._process is None or self._process.poll() is not None:
                raise EndedError(_STAGE, f"the server ended at start:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise DeadlineError(
                    _STAGE, f"the server must answer in {deadline_s:.0f} s, got: {reason}"
                ) from reason
            time.sleep(_POLL_S)

    def _refusal(self) -> Exception | None:
        """Why the server does not answer; None when it does."""
        client = redis.Redis(
            host="127.0.0.1",
            port=self._port,
            password=self._password,
            socket_timeout=_ANSWER_S,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            client.ping()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            return error
        except redis.ResponseError:
            return None  # it answers: with a full disk it refuses even this
        finally:
            client.close()
        return None

    def _log_tail(self) -> str:
        try:
            return "\n".join((self._data_dir / _LOG_NAME).read_text().splitlines()[-5:])
        except FileNotFoundError:
            return "(no log)"


def url_in(data_dir: Path) -> str:
    """The URL of the server that was last started on `data_dir`, from its 0600 `redis.conf`.

    Raises `ConfigError` when none ever was, or the file is torn or not readable by this user.
    """
    try:
        lines = (data_dir / _CONF).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"no server of this run can be found: {error}") from error
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    if not {"requirepass", "port"} <= values.keys():
        raise ConfigError(f"{data_dir / _CONF} must have a port and a password, and has not")
    return f"redis://:{values['requirepass']}@127.0.0.1:{values['port']}/0"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
