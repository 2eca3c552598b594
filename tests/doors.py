"""Every TCP port that some processes listen on, and what a stranger without a token gets there.

A stranger tries HTTP, gRPC with the methods of Ray's own services, and Redis. Only 127.0.0.1 and
::1 are local: 127.0.0.2 and up are addresses of nodes that share a machine.
"""

import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import grpc
import httpx
import psutil

Outcome = Literal["refused", "metrics", "open", "silent"]
Answer = tuple[Outcome, str]
ANYWHERE = ("0.0.0.0", "::")
LOCAL = ("127.0.0.1", "::1")
PATIENCE_S = 4.0
AT_ONCE = 16
AGAIN_S = 10.0  # for those that were silent; all protocols side by side, or it takes minutes
PROTECTED = ("/api/jobs/", "/v1/models")  # by Ray's token, by the endpoint's keys
METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.rpc.RayletDriver/ClusterInfo",
    "ray.serve.ASGIService/HandleRequest",
)


@dataclass(frozen=True)
class Door:
    address: str
    port: int
    process: str
    outcome: Outcome
    answer: str

    def __str__(self) -> str:
        return f"{self.address}:{self.port} {self.process}: {self.outcome}, {self.answer}"

    @property
    def is_local(self) -> bool:
        return self.address.removeprefix("::ffff:") in LOCAL

    @property
    def is_weak(self) -> bool:
        """Open, or beyond loopback with nobody knowing what it answers to."""
        return self.outcome == "open" or (self.outcome == "silent" and not self.is_local)


def doors(pids: Iterable[int]) -> list[Door]:
    """One entry per address and TCP port that the processes listen on: the same port number may be
    another service at another address.
    """
    found: dict[tuple[str, int], str] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            sockets = process.net_connections(kind="tcp")
            name = " ".join(process.cmdline()[:3])[-60:] or process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for connection in sockets:
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault((connection.laddr.ip, connection.laddr.port), name)
    places = sorted(found, key=lambda place: (place[1], place[0]))
    with ThreadPoolExecutor(AT_ONCE) as knockers:
        first = knockers.map(lambda place: _knock(place, PATIENCE_S), places)
        answers = dict(zip(places, first, strict=True))
    silent = [place for place, answer in answers.items() if answer[0] == "silent"]
    with ThreadPoolExecutor(AT_ONCE) as knockers:
        again = knockers.map(lambda place: _knock_at_once(place, AGAIN_S), silent)
        answers |= dict(zip(silent, again, strict=True))
    return [Door(*place, found[place], *answers[place]) for place in places]


def _knock(place: tuple[str, int], patience_s: float) -> Answer:
    """One protocol after the other, until one is answered."""
    return _first(ask(*_reached(place), patience_s) for ask in PROTOCOLS)


def _knock_at_once(place: tuple[str, int], patience_s: float) -> Answer:
    with ThreadPoolExecutor(len(PROTOCOLS)) as asking:
        return _first(asking.map(lambda ask: ask(*_reached(place), patience_s), PROTOCOLS))


def _first(answers: Iterable[Answer | None]) -> Answer:
    known = (answer for answer in answers if answer is not None)
    return next(known, ("silent", "no protocol that is known here"))


def _reached(place: tuple[str, int]) -> tuple[str, int]:
    host = place[0].removeprefix("::ffff:")
    return "127.0.0.1" if host in ANYWHERE else host, place[1]


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ask_redis(host: str, port: int, patience_s: float) -> Answer | None:
    try:
        with socket.create_connection((host, port), patience_s) as connection:
            connection.settimeout(patience_s)
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            reply = connection.recv(100)
    except OSError:
        return None
    if reply.startswith(b"-NOAUTH"):
        return "refused", "Redis: NOAUTH"
    return ("open", "Redis: PONG") if reply.startswith(b"+PONG") else None


def _ask_http(host: str, port: int, patience_s: float) -> Answer | None:
    """One answer is enough: a door that opens for one path is open, whatever the next one does."""
    statuses: list[int] = []
    place = f"http://{_place(host, port)}"
    with httpx.Client(base_url=place, trust_env=False, timeout=patience_s) as client:
        for path in (*PROTECTED, "/metrics"):
            try:
                reply = client.get(path)
            except (httpx.HTTPError, OSError):
                if statuses:
                    break
                return None
            if path == "/metrics" and reply.status_code == 200 and "# TYPE" in reply.text:
                return "metrics", "HTTP: numbers for Prometheus"
            if path in PROTECTED:
                statuses.append(reply.status_code)
    if min(statuses) >= 400 and {401, 403}.intersection(statuses):
        return "refused", f"HTTP: {statuses}"
    return "open", f"HTTP: {statuses}"


def _ask_grpc(host: str, port: int, patience_s: float) -> Answer | None:
    codes: list[str] = []
    with grpc.insecure_channel(_place(host, port)) as channel:
        for method in METHODS:
            call = channel.unary_unary(f"/{method}", lambda body: body, lambda body: body)
            try:
                call(b"", timeout=patience_s)
            except grpc.RpcError as error:
                code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
                if code is grpc.StatusCode.UNAUTHENTICATED:
                    return "refused", "gRPC: UNAUTHENTICATED"
                codes.append(code.name)
                if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return None
            else:
                return "open", f"gRPC: {method} answered"
    return "silent", f"gRPC: {codes}"


PROTOCOLS = (_ask_redis, _ask_http, _ask_grpc)
