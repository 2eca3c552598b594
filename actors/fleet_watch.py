"""Who answers no more: rollout actors that hang, or whose engine is gone while nobody asks it.

Invariant: a worker is given up only after `MISSES` pings in a row without an answer, so that a
machine which is busy for a moment costs none; how long a group may take is nothing to it. Run by
`actors.fleet`.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from actors.fleet_worker import Worker, answers

PING_EVERY_S = 10.0
MISSES = 3


async def watch(
    serving: Callable[[], list[Worker]], bury: Callable[[Worker, Any, str], None]
) -> None:
    """Until it is cancelled, call `bury(worker, its handle, cause)` of those that fell silent."""
    num_missed: dict[Any, int] = {}  # by handle, of those that missed the last one
    while True:
        started = time.monotonic()
        asked = [(worker, worker.handle) for worker in serving()]
        answered = await asyncio.gather(*[answers(worker) for worker, _ in asked])
        silent = [pair for pair, has in zip(asked, answered, strict=True) if not has]
        num_missed = {handle: num_missed.get(handle, 0) + 1 for _, handle in silent}
        for worker, handle in silent:
            if num_missed[handle] >= MISSES and worker in serving():
                bury(worker, handle, f"gave no answer to {MISSES} pings")
        await asyncio.sleep(max(0.0, PING_EVERY_S - (time.monotonic() - started)))
