"""A client that leaves takes its work with it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from serve.api_errors import ApiError
from serve.client_presence import CLIENT_LEFT, Stream, while_connected


class Work:
    """Waits for its turn; notes whether it was cancelled."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.is_cancelled = False

    async def run(self) -> str:
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        return "done"


def request_of(leaves: asyncio.Event) -> Request:
    async def receive() -> Message:
        await leaves.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "headers": []}, receive)


async def test_work_is_cancelled_when_its_client_leaves() -> None:
    work, leaves = Work(), asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, leaves.set)
    with pytest.raises(ApiError) as gone:
        await while_connected(request_of(leaves), work.run())
    assert gone.value.status == CLIENT_LEFT
    assert work.is_cancelled


async def test_work_whose_client_stays_is_answered() -> None:
    work = Work()
    asyncio.get_running_loop().call_later(0.02, work.goes_on.set)
    assert await while_connected(request_of(asyncio.Event()), work.run()) == "done"
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1, "nobody goes on listening"


async def test_a_stream_that_runs_too_long_says_so_and_gives_its_places_back() -> None:
    sent: list[Any] = []
    closed: list[str] = []

    async def events() -> AsyncIterator[str]:
        try:
            yield "data: {}\n\n"
            await asyncio.Event().wait()
        finally:
            closed.append("engine")

    async def send(message: Message) -> None:
        sent.append(message)

    stack = AsyncExitStack()
    stack.callback(closed.append, "places")
    stream = Stream(events(), {"x-request-id": "1"}, stack, deadline_s=0.05)
    await stream({"type": "http"}, request_of(asyncio.Event()).receive, send)
    start, first, last = sent
    assert (start["status"], first["body"]) == (200, b"data: {}\n\n")
    assert (b"cache-control", b"no-cache") in start["headers"]
    error = json.loads(last["body"].removeprefix(b"data: "))["error"]
    assert (error["code"], error["message"]) == ("deadline_exceeded", "not finished in 0.05 s")
    assert not last.get("more_body")
    assert closed == ["engine", "places"]


async def test_a_refusal_and_a_deadline_pass_through() -> None:
    async def refuse() -> None:
        raise ApiError(503, "busy")

    with pytest.raises(ApiError, match="busy"):
        await while_connected(request_of(asyncio.Event()), refuse())
    work = Work()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await while_connected(request_of(asyncio.Event()), work.run())
    assert work.is_cancelled
