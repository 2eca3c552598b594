"""The replay buffer when a reply is lost: the client retries, and nothing happens twice."""

import socket
import threading
import uuid
from collections.abc import Iterator

import pytest

from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import FencedError
from cluster.redis_client import connect
from cluster.replay_buffer import AddResult, ReplayBuffer
from tests.replay_checker import claim, fill, make_buffer, make_group


class LossyProxy:
    """A TCP relay that swallows the reply to the first request naming `victim`, and hangs up."""

    def __init__(self, port: int, victim: bytes) -> None:
        self._target = ("127.0.0.1", port)
        self._victim = victim
        self.num_lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                inward, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(inward,), daemon=True).start()

    def _relay(self, inward: socket.socket) -> None:
        with inward, socket.create_connection(self._target) as outward:
            while request := inward.recv(1 << 20):
                outward.sendall(request)
                reply = outward.recv(1 << 20)
                if self._victim in request and self.num_lost == 0:
                    self.num_lost += 1
                    return
                inward.sendall(reply)


@pytest.fixture
def lossy_buffer(
    server: EmbeddedRedis, run_id: str, request: pytest.FixtureRequest
) -> Iterator[tuple[ReplayBuffer, LossyProxy]]:
    """A buffer behind the proxy; all scripts are loaded, so the lost reply is that of a change."""
    warm = make_buffer(connect(server.url), uuid.uuid4().hex)
    fill(warm, "warm")
    warm.consume(claim(warm), step=1)
    warm.take([], "warm")
    port = int(server.url.rpartition(":")[2].split("/")[0])
    proxy = LossyProxy(port, victim=request.param)
    yield make_buffer(connect(server.url.replace(f":{port}/", f":{proxy.port}/")), run_id), proxy
    proxy.close()


@pytest.mark.parametrize("lossy_buffer", [b"unlucky-owner"], indirect=True)
def test_claim_whose_reply_was_lost_gets_the_same_groups(
    lossy_buffer: tuple[ReplayBuffer, LossyProxy], buffer: ReplayBuffer
) -> None:
    lossy, proxy = lossy_buffer
    fill(buffer, "a", "b", "c")

    assert claim(lossy, 2, owner="unlucky-owner") == ["a", "b"]
    assert proxy.num_lost == 1
    assert claim(buffer) == ["c"]


@pytest.mark.parametrize("lossy_buffer", [b"unlucky-group"], indirect=True)
def test_add_whose_reply_was_lost_is_not_added_twice(
    lossy_buffer: tuple[ReplayBuffer, LossyProxy], buffer: ReplayBuffer
) -> None:
    lossy, proxy = lossy_buffer

    assert lossy.add(make_group("unlucky-group")) is AddResult.DUPLICATE
    assert proxy.num_lost == 1
    assert claim(buffer) == ["unlucky-group"]


@pytest.mark.parametrize("lossy_buffer", [b"unlucky-consume"], indirect=True)
def test_consume_whose_reply_was_lost_may_be_repeated(
    lossy_buffer: tuple[ReplayBuffer, LossyProxy], buffer: ReplayBuffer
) -> None:
    lossy, proxy = lossy_buffer
    fill(buffer, "unlucky-consume")
    claim(buffer)

    lossy.consume(["unlucky-consume"], step=1)
    assert proxy.num_lost == 1
    assert buffer.stats().consumed == 1


@pytest.mark.parametrize("lossy_buffer", [b"unlucky-taker"], indirect=True)
def test_take_whose_reply_was_lost_gets_the_same_groups(
    lossy_buffer: tuple[ReplayBuffer, LossyProxy], buffer: ReplayBuffer
) -> None:
    lossy, proxy = lossy_buffer
    fill(buffer, "a", "b", "c")
    assert claim(buffer, 1) == ["a"]

    assert lossy.take(["a", "b", "c"], "unlucky-taker") == ["b", "c"]
    assert proxy.num_lost == 1
    assert buffer.release(["b", "c"], "unlucky-taker") == 2


@pytest.mark.parametrize("lossy_buffer", [b"last_take_over"], indirect=True)
def test_a_take_over_whose_reply_was_lost_fences_nobody_but_the_one_before(
    lossy_buffer: tuple[ReplayBuffer, LossyProxy], buffer: ReplayBuffer
) -> None:
    lossy, proxy = lossy_buffer
    lossy.epoch = first = buffer.take_over()

    assert lossy.take_over() == first + 1
    assert proxy.num_lost == 1
    fill(lossy, "a")
    with pytest.raises(FencedError):
        buffer.take_over()
    buffer.epoch = lossy.epoch
