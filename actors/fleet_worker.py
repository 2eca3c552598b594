"""One rollout actor as the controller knows it, and how such actors end.

Invariant: `num_running` counts the groups that the actor has in hand; one that is leaving gets no
more. Owned by `actors.fleet`; `actors.weight_sync` moves the state and the version.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ray

from actors.stages import within
from cluster.errors import DeadlineError, StageError
from cluster.status import ActorStatus

END_S = 2.0
PING_S = 10.0
logger = logging.getLogger(__name__)


class WorkerState(StrEnum):
    STARTING = "starting"
    STALE = "stale"  # engine up, weights unproven
    HEALTHY = "healthy"
    ASLEEP = "asleep"  # healthy, but the learner has its GPU
    QUARANTINED = "quarantined"  # failed the probe: serves nothing
    DEAD = "dead"


@dataclass
class Worker:
    """One rollout actor and what the controller knows of it."""

    index: int
    handle: Any
    state: WorkerState = WorkerState.STARTING
    policy_version: int = -1
    pid: int = 0
    num_running: int = 0
    num_restarts: int = 0
    num_in_vain: int = 0  # restarts since the last finished group
    place: str = "rollout"  # the reserved group of bundles that it lives in
    is_leaving: bool = False
    repair: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return f"rollout/{self.index}"

    @property
    def is_in_repair(self) -> bool:
        return self.repair is not None and not self.repair.done()

    def status(self) -> ActorStatus:
        state = "leaving" if self.is_leaving else str(self.state)
        return ActorStatus(
            name=self.name, state=state, policy_version=self.policy_version, pid=self.pid
        )


async def end(actors: Sequence[Any]) -> None:
    """Let engines shut down, then end their actors; None stands for nobody."""
    handles = [actor for actor in actors if actor is not None]
    if handles:
        stopping = [asyncio.ensure_future(_quietly(handle.stop.remote())) for handle in handles]
        await asyncio.wait(stopping, timeout=END_S)
    for handle in handles:
        ray.kill(handle)


async def _quietly(reference: Any) -> None:
    try:
        await reference
    except Exception:
        logger.debug("an actor was gone before it could stop", exc_info=True)


def oldest_version(workers: Iterable[Worker]) -> int | None:
    """The oldest policy version that a group which is sent out now may be sampled by; None while
    all wait for newer weights.
    """
    return min((w.policy_version for w in workers if w.state is WorkerState.HEALTHY), default=None)


async def finish(
    worker: Worker, reference: Any, timeout_s: float, changed: asyncio.Condition
) -> None:
    """Wait for a group that the worker has in hand. Where its time runs out amid a weight sync it
    begins anew after that: engines stand still meanwhile, and a sync has deadlines of its own.
    """
    handle = worker.handle

    def is_held() -> bool:
        return worker.handle is handle and worker.state is WorkerState.STALE

    while True:
        try:
            await within(
                reference,
                stage="rollout",
                what=f"{worker.name} to finish a group",
                deadline_s=timeout_s,
                knob="rollout.timeout_s",
            )
            return
        except DeadlineError:
            if not is_held():
                raise
            async with changed:
                await changed.wait_for(lambda: not is_held())


async def silence(worker: Worker) -> StageError | None:
    """Why the actor has not answered within `PING_S`, or not well; None when it has."""
    try:
        await within(
            worker.handle.ping.remote(),
            stage="rollout",
            what=f"{worker.name} to answer",
            deadline_s=PING_S,
            knob="a fixed bound",
        )
    except StageError as error:
        return error
    return None
