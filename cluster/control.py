"""The door to a living run: requests and replies through the run's own Redis.

Invariant: whoever can read the run directory (or knows `buffer.url`) may ask, nobody else; a
request that outlived its deadline is never carried out, nor one twice, and a request to a run that
is not alive fails in seconds. `ControlClient` serves the CLI and scripts, `ControlServer` the run.
"""

# pyright: reportUnknownMemberType=false

import os
import time
import uuid
from collections import deque
from typing import Any, cast

import msgspec
import redis
import yaml

from cluster.embedded_redis import url_in
from cluster.errors import ConfigError, DeadlineError, HoneError, StageError
from cluster.redis_client import URL_VARIABLE, connect, translated_errors
from cluster.replay_keys import Keys
from cluster.run_dir import RunDir

ALIVE_S = 10
_REPLY_S = 600
_SLICE_S = 1.0
_CONNECT_S = 1.0
_NUM_REMEMBERED = 1000  # requests; one whose push had no reply is pushed again within seconds


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """`deadline_ms` is on the clock of the Redis server."""

    id: str
    command: str
    arguments: dict[str, Any]
    deadline_ms: int


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """`body` is plain data; with `error` set the run refused and nothing was changed."""

    body: Any = None
    error: str = ""


class ControlClient:
    """Asks one run. Example: `ControlClient(RunDir.open("math")).ask("rewards.list", {})`."""

    def __init__(self, run: RunDir) -> None:
        """Raises `ConfigError` when the run is not alive."""
        self._name = run.name
        self._keys = Keys(run.buffer_id)
        try:
            self._client = redis_of(run)
        except ConfigError as error:
            raise self._not_alive(f"its Redis does not answer: {error}") from error
        if not self._is_alive():
            raise self._not_alive(f"no sign of life in the last {ALIVE_S} s")

    def ask(self, command: str, arguments: dict[str, Any], deadline_s: float = 60.0) -> Any:
        """The body of the reply.

        Raises `StageError` with the run's reason when it refuses, `DeadlineError` when it does not
        answer in time (the request is then not started any more), `ConfigError` when it ended.
        """
        request = Request(
            id=uuid.uuid4().hex,
            command=command,
            arguments=arguments,
            deadline_ms=_server_ms(self._client) + round(deadline_s * 1000),
        )
        deadline = time.monotonic() + deadline_s
        with translated_errors(command):
            self._client.rpush(self._keys.requests, msgspec.json.encode(request))
            while (left_s := deadline - time.monotonic()) > 0:
                answer = self._client.blpop(
                    [self._keys.reply(request.id)], timeout=max(0.01, min(_SLICE_S, left_s))
                )
                if answer is not None:
                    return _body(command, cast(tuple[bytes, bytes], answer)[1])
                if not self._is_alive():
                    raise self._not_alive(f"it ended before it answered {command!r}")
        raise DeadlineError(
            "control", f"{command} was not answered in {deadline_s:.0f} s (--deadline); see "
            f"events.jsonl of {self._name} for what came of it"
        )  # fmt: skip

    def _is_alive(self) -> bool:
        return bool(self._client.exists(self._keys.alive))

    def _not_alive(self, why: str) -> ConfigError:
        return ConfigError(
            f"run {self._name!r} must be training to be changed: {why} "
            f"(go on with `hone train CONFIG --run {self._name} --resume`)"
        )


class ControlServer:
    """The run's side; its methods block and belong in a thread."""

    def __init__(self, client: redis.Redis, run_id: str) -> None:
        self._client = client
        self._keys = Keys(run_id)
        self._begun: deque[str] = deque(maxlen=_NUM_REMEMBERED)

    def open(self) -> None:
        """Forget requests to an earlier life of the run, and give the first life sign."""
        with translated_errors("control"):
            self._client.delete(self._keys.requests)
            self._client.set(self._keys.alive, b"1", ex=ALIVE_S)

    def next(self, wait_s: float) -> Request | None:
        """The next request that is still in time and new, or None after `wait_s`; renews the life
        sign.
        """
        with translated_errors("control"):
            self._client.set(self._keys.alive, b"1", ex=ALIVE_S)
            answer = self._client.blpop([self._keys.requests], timeout=wait_s)
            if answer is None:
                return None
            data = cast(tuple[bytes, bytes], answer)[1]
            try:
                request = msgspec.json.decode(data, type=Request)
            except msgspec.DecodeError:
                return None  # not written by a `ControlClient`
            if request.id in self._begun or self.is_late(request):
                return None
            self._begun.append(request.id)
            return request

    def is_late(self, request: Request) -> bool:
        """Whether who asked has given up: such a request must not be started."""
        with translated_errors("control"):
            return _server_ms(self._client) >= request.deadline_ms

    def answer(self, request: Request, reply: Reply) -> None:
        with translated_errors("control"), self._client.pipeline(transaction=True) as pipeline:
            key = self._keys.reply(request.id)
            pipeline.rpush(key, msgspec.json.encode(reply))
            pipeline.expire(key, _REPLY_S)
            pipeline.execute()

    def close(self) -> None:
        """The run is over: say so at once, rather than when the life sign expires."""
        try:
            self._client.delete(self._keys.alive, self._keys.requests)
        except redis.RedisError as error:
            raise HoneError(f"control: Redis is gone: {error}") from error


def _body(command: str, data: bytes) -> Any:
    reply = msgspec.json.decode(data, type=Reply)
    if reply.error:
        raise StageError(command, reply.error)
    return reply.body


def _server_ms(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return seconds * 1000 + micros // 1000


def redis_of(run: RunDir) -> redis.Redis:
    """A connection to the Redis of a run; `ConfigError` when it does not answer."""
    settings: dict[str, dict[str, Any]] = yaml.safe_load(run.config.read_text()) or {}
    url = settings.get("buffer", {}).get("url") or os.environ.get(URL_VARIABLE)
    return connect(url or url_in(run.redis), retry_s=_CONNECT_S)
