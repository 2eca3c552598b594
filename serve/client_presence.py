"""Work for a client that may leave before it is done.

Invariant: nobody works on for a client that has gone: its generation is cancelled, and the engine's
places are free again. Around answers that are sent whole; a stream notices by itself.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from serve.api_errors import ApiError

CLIENT_LEFT = 499
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


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
