"""What the launcher keeps alive: the controller, and a Redis of the run's own.

Invariant: one that dies is noticed by its process, one that hangs by its silence, so no wait of the
launcher is without an end; whoever is killed for silence has had longer than any call may take.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import redis

from cluster.embedded_redis import EmbeddedRedis, EndedError
from cluster.errors import ConfigError, DeadlineError, StageError
from cluster.redis_client import CALL_S, OUTAGE_S

HANG_S = 120.0  # without an answer
PING_EVERY_S = 5.0
START_TRY_S = 5.0  # of a server that died
MAX_ENDED = 5  # starts in a row that the server did not survive: its data or its memory is at fault
logger = logging.getLogger(__name__)


class Pulse:
    """Whether an actor answers at all. Example: `Pulse(actor.__ray_ready__.remote).is_gone()`,
    asked again and again.
    """

    def __init__(self, ping: Callable[[], Any]) -> None:
        self._ping = ping
        self._asked_at = time.monotonic()
        self._answer = ping()
        self._limit_s = OUTAGE_S + HANG_S  # to come up, for which it may have to wait for Redis
        self._is_gone = False

    def is_gone(self) -> bool:
        """No answer for `HANG_S`, now or ever before; returns at once."""
        silent_s = time.monotonic() - self._asked_at
        if self._is_gone or silent_s < PING_EVERY_S:
            return self._is_gone
        if ray.wait([self._answer], timeout=0)[0]:
            self._asked_at, self._answer, self._limit_s = time.monotonic(), self._ping(), HANG_S
        else:
            self._is_gone = silent_s > self._limit_s
        return self._is_gone


class RedisKeeper:
    """Brings a server that died or hangs back, on the same data and address."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self._server = server
        self._away_since: float | None = None
        self._silent_since: float | None = None  # running, but without any answer
        self._num_ended = 0

    def keep_up(self) -> None:
        """One short try, because nobody hears an interrupt meanwhile.

        Raises `DeadlineError` when the server has been away for `OUTAGE_S`, as a run waits for it,
        and `StageError` with the end of its log when it ends at every start.
        """
        started = time.monotonic()
        try:
            self._server.start(START_TRY_S)
        except EndedError:
            self._num_ended += 1
            if self._num_ended == MAX_ENDED:
                raise
        except (ConfigError, DeadlineError, OSError) as error:  # a child of the dead one has it, or
            # the disk is full
            self._away_since = self._away_since or started
            if time.monotonic() - self._away_since > OUTAGE_S:
                raise DeadlineError("redis", f"away for {OUTAGE_S:.0f} s: {error}") from error
            is_silent = isinstance(error.__cause__, redis.TimeoutError)
            self._silent_since = (self._silent_since or started) if is_silent else None
            self._end_silence()
        else:
            self._away_since = self._silent_since = None
            self._num_ended = 0

    def _end_silence(self) -> None:
        """One that loads its data says so; one that says nothing for `CALL_S` hangs."""
        if self._silent_since is not None and time.monotonic() - self._silent_since > CALL_S:
            logger.warning("Redis gave no answer for %.0f s: killed", CALL_S)
            self._silent_since = None
            with suppress(StageError):  # it has ended meanwhile
                self._server.kill()
