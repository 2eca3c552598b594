"""The door of a run: requests that came through `cluster.control` are carried out and answered.

Invariant: each request is answered once, with what came of it or with why not; a refusal is also a
line in events.jsonl, and a request whose turn comes after its deadline is not started. Requests run
side by side; whoever serves a family of them keeps its own order. Owned by the controller's parts.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from actors.fleet import EventSink
from cluster.control import ControlServer, Reply, Request
from cluster.errors import BufferUnavailableError, ConfigError, DeadlineError, HoneError, boundary
from cluster.redis_client import OUTAGE_S

POLL_S = 0.5
log = logging.getLogger(__name__)
Serve = Callable[[Request], Awaitable[Any]]


class Door:
    """Example: `door.serve("rewards", admin.carry_out, refusal="reward_refused")` gets each request
    whose command starts with `rewards.`; `on_poll` is called twice a second.
    """

    def __init__(self, server: ControlServer, on_event: EventSink) -> None:
        self._server = server
        self._on_event = on_event
        self._families: dict[str, tuple[Serve, str]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self.on_poll: Callable[[], None] = lambda: None

    def serve(self, family: str, serve: Serve, refusal: str) -> None:
        self._families[family] = serve, refusal

    async def open(self) -> None:
        """Waits for a Redis that is away, as all of a run does."""
        deadline = time.monotonic() + OUTAGE_S
        while True:
            try:
                await asyncio.to_thread(self._server.open)
                break
            except BufferUnavailableError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(POLL_S)
        self._listener = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """What is being carried out is cancelled."""
        for task in (self._listener, *self._answering):
            if task is not None:
                task.cancel()
        try:
            await asyncio.to_thread(self._server.close)
        except HoneError as error:
            log.warning("%s", error)

    async def require_in_time(self, request: Request) -> None:
        """`DeadlineError` when who asked has given up meanwhile."""
        if await asyncio.to_thread(self._server.is_late, request):
            raise DeadlineError(
                "control", f"{request.command} came to its turn after its deadline, behind "
                "another request: nothing was changed"
            )  # fmt: skip

    async def _listen(self) -> None:
        while True:
            try:
                request = await asyncio.to_thread(self._server.next, POLL_S)
            except HoneError as error:
                log.warning("requests cannot be read: %s", error)
                await asyncio.sleep(POLL_S)
                continue
            self.on_poll()
            if request is not None:
                task = asyncio.create_task(self._answer(request))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

    async def _answer(self, request: Request) -> None:
        family = request.command.partition(".")[0]
        serve, refusal = self._families.get(family, (_unknown, "request_refused"))
        try:
            with boundary(family):
                reply = Reply(body=await serve(request))
        except HoneError as error:
            reply = Reply(error=str(error))
            self._on_event(refusal, command=request.command, reason=str(error)[:1000])
        try:
            await asyncio.to_thread(self._server.answer, request, reply)
        except HoneError as error:
            log.warning("%s was not told of %s: %s", request.id, request.command, error)


async def _unknown(request: Request) -> Any:
    raise ConfigError(f"unknown request {request.command!r}")
