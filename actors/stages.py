"""Who waits for what, since when: the source of wait metrics, the live view and the watchdog.

Invariant: a stage is either busy or waits for exactly one named thing. Each loop of the
controller wraps its waits in `stages.wait(...)`; nobody has to guess why a run stands still.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from ray.exceptions import RayError, RayTaskError

from cluster.errors import (
    ActorLostError,
    DeadlineError,
    HoneError,
    InputLostError,
    StageError,
)
from cluster.status import StageStatus

Result = TypeVar("Result")
logger = logging.getLogger(__name__)
LOG_AFTER_S = 10.0


@dataclass
class _Stage:
    waiting_for: str = "work"
    since: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0
    num_running: int = 0
    window_started: float = field(default_factory=time.monotonic)


class Stages:
    """One entry per stage, in the order given."""

    def __init__(self, names: list[str]) -> None:
        self._stages = {name: _Stage() for name in names}

    @contextmanager
    def wait(self, name: str, what: str) -> Iterator[None]:
        """Mark a sequential stage as waiting for `what` while the block runs."""
        stage = self._stages[name]
        self._switch(stage, what)
        try:
            yield
        finally:
            self._switch(stage, "")

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """One of possibly many parallel uses of a stage; with none left it waits for work."""
        stage = self._stages[name]
        stage.num_running += 1
        if stage.num_running == 1:
            self._switch(stage, "")
        try:
            yield
        finally:
            stage.num_running -= 1
            if stage.num_running == 0:
                self._switch(stage, "work")

    def drain(self) -> dict[str, tuple[float, float]]:
        """Per stage (seconds waited, busy fraction) since the last call."""
        now = time.monotonic()
        result: dict[str, tuple[float, float]] = {}
        for name, stage in self._stages.items():
            self._switch(stage, stage.waiting_for, restart=False)
            window = max(1e-9, now - stage.window_started)
            result[name] = (stage.waited_s, max(0.0, 1.0 - stage.waited_s / window))
            stage.waited_s, stage.window_started = 0.0, now
        return result

    def statuses(self) -> list[StageStatus]:
        now = time.monotonic()
        return [
            StageStatus(
                name=name,
                waiting_for=stage.waiting_for,
                since_s=now - stage.since,
                busy_fraction=self._busy_fraction(stage, now),
            )
            for name, stage in self._stages.items()
        ]

    def _busy_fraction(self, stage: _Stage, now: float) -> float:
        waited = stage.waited_s + (now - stage.since if stage.waiting_for else 0.0)
        return max(0.0, 1.0 - waited / max(1e-9, now - stage.window_started))

    @staticmethod
    def _switch(stage: _Stage, waiting_for: str, *, restart: bool = True) -> None:
        now = time.monotonic()
        if stage.waiting_for:
            stage.waited_s += now - max(stage.since, stage.window_started)
        if restart or stage.waiting_for:
            stage.since = now
        stage.waiting_for = waiting_for


async def within(
    awaitable: Awaitable[Result], *, stage: str, what: str, deadline_s: float, knob: str
) -> Result:
    """Await with a deadline; past 10 s it logs what for. `DeadlineError` names the knob.

    An error of ours that an actor raised comes out as it was, without Ray's wrapping. Whatever else
    Ray reports (a dead actor or node, memory, a lost object) is an `ActorLostError`: the one place
    that knows Ray's errors.
    """

    async def report() -> None:
        waited = 0.0
        while True:
            await asyncio.sleep(LOG_AFTER_S)
            waited += LOG_AFTER_S
            logger.info("%s: waiting for %s for %.0f s of %.0f", stage, what, waited, deadline_s)

    reporter = asyncio.create_task(report())
    try:
        return await asyncio.wait_for(awaitable, deadline_s)
    except RayTaskError as error:  # before TimeoutError, which it may also be
        if isinstance(error.cause, HoneError):
            raise error.cause from None
        if isinstance(error.cause, RayError):  # of its arguments
            raise InputLostError(stage, f"{what}: {last_line(error.cause)}") from error
        raise StageError(stage, f"{what}: {error.cause}") from error
    except RayError as error:
        raise ActorLostError(stage, f"{what}: {last_line(error)}") from error
    except TimeoutError:
        raise DeadlineError(
            stage, f"waited {deadline_s:.0f} s for {what} ({knob}); see the logs of that actor"
        ) from None
    finally:
        reporter.cancel()


def last_line(error: Exception) -> str:
    """Of what Ray tells of a dead actor: the line that says why."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:400] if lines else type(error).__name__
