"""What a replica does again and again beside its requests: each chore fails for itself.

Invariant: a chore that fails keeps no other from being done, is tried again after a pause that
grows to `MAX_PAUSE_S`, is told once in the log for each reason, and counted until it works again.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cluster.errors import HoneError
from serve.api_errors import ApiError

FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 5.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """`count` tries in a row failed, the last one with `reason`."""

    reason: str
    count: int
    again_at: float  # monotonic seconds


class Chores:
    """Example: `await chores.run("follow", follow)`."""

    def __init__(self) -> None:
        self._failures: dict[str, Failure] = {}

    async def run(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` unless its pause is not over; never raises but when cancelled."""
        before = self._failures.get(name)
        if before is not None and time.monotonic() < before.again_at:
            return
        try:
            await work()
        except Exception as error:
            reason = str(error) or type(error).__name__
            count = 1 if before is None else before.count + 1
            pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(count, 10))
            self._failures[name] = Failure(reason, count, time.monotonic() + pause_s)
            if before is None or before.reason != reason:
                is_ours = isinstance(error, HoneError | ApiError)
                logger.warning("%s: %s", name, reason, exc_info=None if is_ours else error)
        else:
            self._failures.pop(name, None)

    @property
    def problem(self) -> str:
        """What does not work now, and how often in a row it did not; empty when all is well."""
        return "; ".join(f"{f.reason} (tried {f.count})" for f in self._failures.values())
