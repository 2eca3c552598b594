"""Answers for clients that may leave before they are done, or not read them.

Invariant: nobody works on for a client that has gone: its generation is cancelled, and its places
are free again. A stream that runs too long ends with OpenAI's error event, not in the middle.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.api_errors import ApiError, too_late

CLIENT_LEFT = 499
LAST_WORDS_S = 5.0  # for the event that says why a stream ends
Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns or raises; `ApiError` 499, which nobody reads, when the client has left.

    The body of `request` must have been read.
    """
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_LEFT, "the client has left", code="client_left")
        return task.result()
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Stream(StreamingResponse):
    """Server-sent events; `sent` is closed however they end."""

    def __init__(
        self,
        events: AsyncIterator[str],
        headers: Mapping[str, str],
        sent: AsyncExitStack,
        deadline_s: float,
    ) -> None:
        headers = {**headers, "Cache-Control": "no-cache"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._sent = sent
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._sent:
            try:
                async with asyncio.timeout(self._deadline_s):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                event = f"data: {json.dumps(too_late(self._deadline_s).body())}\n\n"
                with suppress(TimeoutError):  # its client may not be reading
                    async with asyncio.timeout(LAST_WORDS_S):
                        await send({"type": "http.response.body", "body": event.encode()})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
