"""The launcher brings back what dies and what hangs: real servers, a real actor."""

import asyncio
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import redis

from actors import keepers
from actors.keepers import Pulse, RedisKeeper
from actors.train import STOP_S
from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import DeadlineError, StageError
from cluster.redis_client import connect

TRY_S, SOON_S = 0.2, 30.0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedRedis]:
    """Tries are short, and calls too."""
    assert keepers.START_TRY_S < STOP_S, "an interrupt is heard in time"
    monkeypatch.setattr(keepers, "START_TRY_S", TRY_S)
    monkeypatch.setattr(keepers, "CALL_S", 1.0)
    with EmbeddedRedis(tmp_path / "redis") as server:
        connect(server.url).set("key", "value")
        yield server


def wait_for_another(keeper: RedisKeeper, server: EmbeddedRedis, pid: int) -> None:
    deadline = time.monotonic() + SOON_S
    while True:
        keeper.keep_up()
        if keeper._away_since is None and server.pid != pid:
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_comes_back_with_its_data(
    server: EmbeddedRedis, number: signal.Signals
) -> None:
    keeper, pid, url = RedisKeeper(server), server.pid, server.url
    os.kill(pid, number)
    wait_for_another(keeper, server, pid)
    assert server.url == url
    assert connect(server.url).get("key") == b"value"


def test_a_server_that_hangs_for_a_moment_is_left_alone(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "CALL_S", SOON_S)
    keeper, pid = RedisKeeper(server), server.pid
    os.kill(pid, signal.SIGSTOP)
    keeper.keep_up()
    since = keeper._away_since
    keeper.keep_up()
    assert since is not None
    assert keeper._away_since == since, "an outage is counted from its first try"
    os.kill(pid, signal.SIGCONT)
    time.sleep(TRY_S)
    keeper.keep_up()
    assert (server.pid, keeper._away_since, keeper._silent_since) == (pid, None, None)


def test_an_outage_without_an_end_ends_the_run(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "OUTAGE_S", 0.0)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineError, match="redis: away for 0 s: embedded redis: the server must"):
        RedisKeeper(server).keep_up()
    server.kill()


def test_a_full_disk_is_waited_for(server: EmbeddedRedis) -> None:
    """The server refuses even a ping then; when there is room again it goes on by itself."""
    keeper, pid, client = RedisKeeper(server), server.pid, connect(server.url, retry_s=0.0)
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))
    client.set("more", "x" * 4096)
    deadline = time.monotonic() + SOON_S

    def ping_until_refused() -> None:
        while time.monotonic() < deadline:
            client.ping()
            time.sleep(0.05)

    with pytest.raises(redis.ResponseError, match="MISCONF"):
        ping_until_refused()
    keeper.keep_up()
    assert (server.pid, keeper._away_since) == (pid, None)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    while time.monotonic() < deadline:
        try:
            assert client.get("more") == b"x" * 4096
            client.set("more", "less")
            break
        except redis.ResponseError:
            time.sleep(0.05)
    keeper.keep_up()
    assert server.pid == pid
    assert client.get("more") == b"less"


def test_a_server_that_cannot_load_its_data_is_not_tried_for_ever(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    server.kill()
    for file in (tmp_path / "redis" / "appendonlydir").glob("*.incr.aof"):
        file.write_bytes(b"*3\r\n$3\r\nSET\r\nnot a length\r\n" + file.read_bytes())
    keeper = RedisKeeper(server)

    def keep_up_for(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            keeper.keep_up()

    with pytest.raises(StageError, match="the server ended at start"):
        keep_up_for(SOON_S)


class Sleeper:
    """An actor with an event loop, as the controller is."""

    async def pid(self) -> int:
        return os.getpid()

    async def sleep(self) -> None:
        await asyncio.sleep(600)


@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_answers_nothing_is_gone_and_a_busy_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keepers, "PING_EVERY_S", 0.1)
    actor: Any = ray.remote(Sleeper).options(num_cpus=0).remote()
    pid: int = ray.get(actor.pid.remote(), timeout=SOON_S)
    work = actor.sleep.remote()
    monkeypatch.setattr(keepers, "HANG_S", 2.0)
    pulse = Pulse(actor.__ray_ready__.remote)
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        assert not pulse.is_gone()
        time.sleep(0.05)
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + SOON_S
    while not pulse.is_gone():
        assert time.monotonic() < until
        time.sleep(0.05)
    ray.kill(actor)
    assert ray.wait([work], timeout=SOON_S)[0]
    assert pulse.is_gone(), "the launcher says why"


class Late:
    """Waits in its constructor, as a controller does for Redis."""

    def __init__(self) -> None:
        time.sleep(4.0)


@pytest.mark.usefixtures("local_ray")
def test_an_actor_that_comes_up_is_given_the_time_of_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keepers, "PING_EVERY_S", 0.1)
    monkeypatch.setattr(keepers, "HANG_S", 0.5)
    actor: Any = ray.remote(Late).options(num_cpus=0).remote()
    pulse = Pulse(actor.__ray_ready__.remote)
    until = time.monotonic() + SOON_S
    while pulse._limit_s > keepers.HANG_S:
        assert not pulse.is_gone()
        assert time.monotonic() < until
        time.sleep(0.05)
    ray.kill(actor)
