"""What Prometheus sees of the endpoint: requests by route and status, latency, requests inside.

Invariant: every HTTP request is counted once, when its last byte has left or its client has.
Scraped from Ray's exporter as `ray_hone_endpoint_*`; the replica's own door reports to nobody else.
"""

import time

from ray.util.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LATENCY_MS = [
    *(5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0),
    *(1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5),
]
NO_ANSWER = 499  # the client left before there was one


class Traffic:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_inside = 0
        self._requests = Counter(
            "hone_endpoint_requests", "Requests answered", tag_keys=("route", "status_code")
        )
        self._latency = Histogram(
            "hone_endpoint_latency_ms", "Time to the last byte", LATENCY_MS, tag_keys=("route",)
        )
        self._inside = Gauge("hone_endpoint_requests_inside", "Requests in progress")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = NO_ANSWER

        async def note_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.monotonic()
        self._enter(1)
        try:
            await self._app(scope, receive, note_and_send)
        finally:
            self._enter(-1)
            route = getattr(scope.get("route"), "path", "unknown")
            self._requests.inc(1, {"route": route, "status_code": str(status)})
            self._latency.observe(1000 * (time.monotonic() - started), {"route": route})

    def _enter(self, change: int) -> None:
        self._num_inside += change
        self._inside.set(self._num_inside)
