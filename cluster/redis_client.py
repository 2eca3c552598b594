"""The connection to Redis: made once per process, checked at the start, retried for a bounded time.

Invariant: a client that `connect` returned talks to a server of version 7.0 or newer, and none of
its calls blocks or retries without end. Called by every process that touches the replay buffer.
"""

# pyright: reportUnknownMemberType=false

import logging
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ClusterDownError
from redis.retry import Retry

from cluster.config import BufferSection
from cluster.errors import BufferFullError, BufferUnavailableError, ConfigError, FencedError

URL_VARIABLE = "HONE_BUFFER_URL"
_OLDEST = (7, 0)
_SOCKET_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
OUTAGE_S = 600.0  # how long a run waits for a server that is away
CALL_S = 60.0  # how long a worker's call does, before its caller hears of it and asks again

# A full disk, and what servers and their blocked clients hear while a replica takes over.
_PASSING = re.compile(r"(?:^|caused error: )(?:MISCONF|UNBLOCKED|NOREPLICAS)\b")
_PASSING_ERRORS = (redis.ReadOnlyError, ClusterDownError)  # MASTERDOWN is one

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)
_waits: dict[object, float] = {}  # calls of this process that wait for a server, since when


def waited_s() -> float:
    """How long calls of this process have waited for a server that is away; 0 when none does."""
    now = time.monotonic()
    return now - min(_waits.copy().values(), default=now)


class _BoundedRetry(Retry):
    """Retries for `retry_s`, with jittered pauses, what passes by itself."""

    def __init__(self, retry_s: float) -> None:
        super().__init__(ExponentialWithJitterBackoff(_LONGEST_PAUSE_S, _FIRST_PAUSE_S), retries=-1)
        self._retry_s = retry_s

    def call_with_retry(
        self,
        do: Callable[[], Answer],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> Answer:
        call, started = object(), time.monotonic()
        failures = 0
        try:
            while True:
                try:
                    return do()
                except (*self._supported_errors, redis.ResponseError) as error:
                    if not _passes(error) or (is_retryable and not is_retryable(error)):
                        raise
                    failures += 1
                    fail(*((error, failures) if with_failure_count else (error,)))
                    remaining_s = started + self._retry_s - time.monotonic()
                    if remaining_s <= 0:
                        raise
                    _waits[call] = started
                    time.sleep(min(self._backoff.compute(failures), remaining_s))
        finally:
            _waits.pop(call, None)


def _passes(error: Exception) -> bool:
    """Whether the same call may succeed later: no answer, a full disk, a failover; never a bad
    password.
    """
    if isinstance(error, _PASSING_ERRORS):
        return True
    if isinstance(error, redis.ResponseError):
        return _PASSING.search(str(error)) is not None
    return not isinstance(error, redis.AuthenticationError)


def connect(url: str, *, retry_s: float = 10.0) -> redis.Redis:
    """A thread-safe client for `url`; calls retry a lost connection for about `retry_s` seconds.

    Raises `ConfigError`, naming `buffer.url` with the password hidden, when the server cannot be
    reached within `retry_s`, refuses the password or is older than 7.0. Warns when the server may
    lose or evict groups.
    """
    shown = redacted(url)
    try:
        client = redis.Redis.from_url(
            url,
            retry=_BoundedRetry(retry_s),
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            protocol=2,
        )
    except ValueError as error:
        raise ConfigError(
            f"buffer.url must look like redis://:password@host:port/0, got {shown}"
        ) from error
    started = time.monotonic()
    try:
        facts: dict[str, Any] = client.info()
    except redis.RedisError as error:
        client.close()
        waited_s = time.monotonic() - started
        raise ConfigError(
            f"buffer.url must name a Redis or Valkey server that answers: {shown} did not, tried "
            f"INFO for {waited_s:.1f} s: {type(error).__name__}: {error}"
        ) from error
    _check(facts, shown)
    return client


def buffer_url(settings: BufferSection, address: str) -> str | None:
    """`buffer.url`, else `HONE_BUFFER_URL` of the environment, which no file of the run repeats.

    None means a server of the run's own; raises `ConfigError` where other nodes could not reach it.
    """
    url = settings.url or os.environ.get(URL_VARIABLE) or None
    if url is None and address != "local":
        raise ConfigError(
            f"buffer.url: required with --address {address}, so that all nodes reach the same "
            f"Redis; or set {URL_VARIABLE} where the run starts"
        )
    return url


def redacted(url: str) -> str:
    """`url` with its password, and any settings behind `?`, replaced by `***`."""
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "a malformed URL"
    user = f"{parts.username or ''}:***@" if "@" in parts.netloc else ""
    settings = "?***" if parts.query else ""
    return f"{parts.scheme}://{user}{place}{parts.path}{settings}"


@contextmanager
def translated_errors(action: str) -> Generator[None]:
    """Redis's errors as Hone's: out of memory is back-pressure, no answer is unavailability."""
    try:
        yield
    except redis.OutOfMemoryError as error:
        raise BufferFullError(
            f"{action}: Redis must have memory left, raise its maxmemory, or lower "
            "buffer.capacity_groups, and run.checkpoint_every, because the groups of steps that no "
            f"checkpoint holds stay: {error}"
        ) from error
    except (redis.ConnectionError, redis.TimeoutError, *_PASSING_ERRORS) as error:
        raise BufferUnavailableError(
            f"{action}: the server at buffer.url did not answer for as long as was waited; a run "
            f"that ended for this goes on with `--resume` when it is back: {error}"
        ) from error
    except redis.ResponseError as error:
        if str(error).startswith("FENCED"):
            raise FencedError(
                f"{action}: a newer controller of this run has taken over ({error}): this one must "
                "end"
            ) from error
        if not _PASSING.search(str(error)):
            raise
        raise BufferUnavailableError(
            f"{action}: Redis must be able to write its disk, and have replicas where it asks for "
            f"some: {error}"
        ) from error


def _check(facts: dict[str, Any], shown: str) -> None:
    version = str(facts["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ConfigError(f"buffer.url: {shown} must be version 7.0 or newer, got {version}")
    policy = facts.get("maxmemory_policy")
    if policy != "noeviction":
        _log.warning(
            "%s may evict trajectories: maxmemory-policy is %s, "
            "set it with CONFIG SET maxmemory-policy noeviction",
            shown,
            policy,
        )
    if not facts.get("aof_enabled"):
        _log.warning(
            "%s loses the replay buffer when it restarts: the AOF is off, "
            "turn it on with CONFIG SET appendonly yes",
            shown,
        )
