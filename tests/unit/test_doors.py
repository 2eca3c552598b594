"""The check of open ports can fail: it tells an open door from one that refuses."""

import os
import socket
import threading
import time
from concurrent import futures
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from cluster.embedded_redis import EmbeddedRedis
from tests import doors as knocking
from tests.doors import Door, doors

SLOW_S = 0.5


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


class SlowToRefuse(Quiet):
    def do_GET(self) -> None:
        time.sleep(SLOW_S)
        self.send_error(401)


class OpenOnce(Quiet):
    """Lists everything to who asks for jobs, and hangs up on any other question."""

    def do_GET(self) -> None:
        if self.path == knocking.PROTECTED[0]:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
        self.close_connection = True


def test_open_refusing_and_unknown_doors_are_told_apart(tmp_path: Path) -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    registry = CollectorRegistry()
    Gauge("anything", "so that there is a sample", registry=registry).set(1)
    exporter, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
    same_port, _ = start_http_server(web.server_port, addr="127.0.0.2", registry=registry)
    unknown = grpc.server(futures.ThreadPoolExecutor(1))
    unknown_port = unknown.add_insecure_port("127.0.0.1:0")
    unknown.start()
    try:
        with EmbeddedRedis(tmp_path) as redis:
            listed = doors([os.getpid(), redis.pid])
            redis_port = urlsplit(redis.url).port or 0
    finally:
        web.shutdown()
        exporter.shutdown()
        same_port.shutdown()
        unknown.stop(None)
    at = {(door.address, door.port): door.outcome for door in listed}
    assert at["127.0.0.1", web.server_port] == "open"
    assert at["127.0.0.2", web.server_port] == "metrics", "another address, another service"
    found = {door.port: door for door in listed}
    assert found[exporter.server_port].outcome == "metrics"
    assert found[unknown_port].outcome == "silent"
    assert found[redis_port].outcome == "refused"
    assert found[redis_port].is_local


@pytest.mark.parametrize(
    ("address", "is_local"),
    [("127.0.0.1", True), ("::ffff:127.0.0.1", True), ("::1", True), ("127.0.0.2", False),
     ("0.0.0.0", False), ("::", False)],
)  # fmt: skip
def test_the_address_of_a_node_is_not_loopback(address: str, is_local: bool) -> None:
    assert Door(address, 1, "a node", "silent", "").is_local is is_local


def test_a_door_that_is_slow_among_many_is_asked_again_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), SlowToRefuse)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    place = ("127.0.0.1", web.server_port)
    monkeypatch.setattr(knocking, "PATIENCE_S", SLOW_S / 5)
    try:
        assert knocking._knock(place, SLOW_S / 5)[0] == "silent"
        found = {door.port: door.outcome for door in doors([os.getpid()])}
    finally:
        web.shutdown()
    assert found[web.server_port] == "refused"


def test_a_door_that_opens_for_one_path_is_open_whatever_the_next_one_does() -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), OpenOnce)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        answer = knocking._knock(("127.0.0.1", web.server_port), 5)
    finally:
        web.shutdown()
    assert answer == ("open", "HTTP: [200]")


def test_a_silent_door_costs_one_wait_when_it_is_asked_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        answer = knocking._knock_at_once(silent.getsockname(), 1.0)
    assert answer[0] == "silent"
    assert time.monotonic() - started < 2.5, "three protocols, a second each"
