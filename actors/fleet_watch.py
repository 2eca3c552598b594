"""Who answers no more: rollout actors that hang, or whose engine is gone while nobody asks it.

Invariant: a worker that is silent is given up only after `MISSES` pings in a row, so that a machine
which is busy for a moment costs none, and one whose actor or engine is known to be gone at once;
how long a group may take is nothing to it. Run by `actors.fleet`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from actors.fleet_worker import Worker, silence
from cluster.errors import DeadlineError

PING_EVERY_S = 10.0
MISSES = 3
_log = logging.getLogger(__name__)


async def watch(
    serving: Callable[[], list[Worker]], bury: Callable[[Worker, Any, str], None]
) -> None:
    """Until it is cancelled, call `bury(worker, its handle, cause)` of those that are lost."""
    num_missed: dict[Any, int] = {}  # by handle, of those that missed the last one
    while True:
        started = time.monotonic()
        try:
            num_missed = await _ask(serving, bury, num_missed)
        except Exception:  # without it nobody would be asked again
            _log.exception("a round of pings failed")
        await asyncio.sleep(max(0.0, PING_EVERY_S - (time.monotonic() - started)))


async def _ask(
    serving: Callable[[], list[Worker]],
    bury: Callable[[Worker, Any, str], None],
    num_missed: dict[Any, int],
) -> dict[Any, int]:
    """One ping of each; how many in a row each has missed with it, of those that missed it."""
    asked = [(worker, worker.handle) for worker in serving()]
    errors = await asyncio.gather(*[silence(worker) for worker, _ in asked])
    missed: dict[Any, int] = {}
    for (worker, handle), error in zip(asked, errors, strict=True):
        if error is None or worker not in serving():
            continue
        missed[handle] = num_missed.get(handle, 0) + 1
        if not isinstance(error, DeadlineError):
            bury(worker, handle, str(error))
        elif missed[handle] >= MISSES:
            bury(worker, handle, f"gave no answer to {MISSES} pings")
    return missed
