"""Every TCP port that some processes listen on, and what a stranger without a token gets there.

A stranger tries HTTP, gRPC with the methods of Ray's own services, and Redis.
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
ANYWHERE = ("0.0.0.0", "::")
PATIENCE_S = 4.0
AT_ONCE = 16
PATHS = ("/api/jobs/", "/metrics", "/")
METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.rpc.RayletDriver/ClusterInfo",
)


@dataclass(frozen=True)
class Door:
    address: str
    port: int
    process: str
    outcome: Outcome
    answer: str

    @property
    def is_local(self) -> bool:
        return self.address.removeprefix("::ffff:").startswith("127.") or self.address == "::1"


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
        answers = knockers.map(_knock, places)
    return [
        Door(ip, port, found[ip, port], *answer)
        for (ip, port), answer in zip(places, answers, strict=True)
    ]


def _knock(place: tuple[str, int]) -> tuple[Outcome, str]:
    host, port = place[0].removeprefix("::ffff:"), place[1]
    host = "127.0.0.1" if host in ANYWHERE else host
    for ask in (_ask_redis, _ask_http, _ask_grpc):
        answer = ask(host, port)
        if answer is not None:
            return answer
    return "silent", "no protocol that is known here"


def _ask_redis(host: str, port: int) -> tuple[Outcome, str] | None:
    try:
        with socket.create_connection((host, port), PATIENCE_S) as connection:
            connection.settimeout(PATIENCE_S)
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            reply = connection.recv(100)
    except OSError:
        return None
    if reply.startswith(b"-NOAUTH"):
        return "refused", "Redis: NOAUTH"
    return ("open", "Redis: PONG") if reply.startswith(b"+PONG") else None


def _ask_http(host: str, port: int) -> tuple[Outcome, str] | None:
    statuses: list[int] = []
    for path in PATHS:
        try:
            reply = httpx.get(f"http://{host}:{port}{path}", timeout=PATIENCE_S)
        except (httpx.HTTPError, OSError):
            return None
        if path == "/metrics" and reply.status_code == 200 and "# TYPE" in reply.text:
            return "metrics", "HTTP: numbers for Prometheus"
        statuses.append(reply.status_code)
    if all(status in (401, 403) for status in statuses[:1]):
        return "refused", f"HTTP: {statuses[0]}"
    return "open", f"HTTP: {statuses}"


def _ask_grpc(host: str, port: int) -> tuple[Outcome, str] | None:
    codes: list[str] = []
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        for method in METHODS:
            call = channel.unary_unary(f"/{method}", lambda body: body, lambda body: body)
            try:
                call(b"", timeout=PATIENCE_S)
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
