"""How long a request waited for its engine, whatever its client did meanwhile.

Invariant: a client that reads slowly, or not at all, adds nothing: only the waits for the engine's
next event count. One per request; read by the guards.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

Result = TypeVar("Result")


class EngineTime:
    """Example: `reply = await clock.wait_for(engine.respond(...))`; then `clock.total_s`."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._since: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the engine owes an answer; stays true when the wait was broken off."""
        return self._since is not None

    async def wait_for(self, answer: Awaitable[Result]) -> Result:
        self._since = time.monotonic()
        result = await answer
        self._stop()
        return result

    async def timed(self, events: AsyncIterator[str]) -> AsyncGenerator[str]:
        """`events`, each wait for the next one counted."""
        self._since = time.monotonic()
        try:
            async for event in events:
                self._stop()
                yield event
                self._since = time.monotonic()
            self._stop()
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    def _stop(self) -> None:
        if self._since is not None:
            self.total_s += time.monotonic() - self._since
            self._since = None
