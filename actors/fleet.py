"""The fleet of rollout actors: who is healthy, who gets the next group, who is replaced.

Invariant: a worker receives work only in state HEALTHY, which it enters only after it loaded the
current weights and passed the probe. The groups of a worker that died or hangs are produced again
elsewhere; a replacement starts STALE. Used by the controller and by `actors.weight_sync`.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.placement import Placement
from actors.rollout import RolloutRequest
from actors.rollout_worker import RolloutWorker
from actors.stages import within
from cluster.errors import DeadlineError, StageError
from cluster.status import ActorStatus

MAX_RESTARTS = 5  # of one worker without a finished group in between
MAX_TRIES = 3
MAX_HANGS = 2  # workers that one group may hold up before it is the group's fault
PING_S = 10.0
MAX_CALLS = 4096  # concurrent calls of one worker's event loop
logger = logging.getLogger(__name__)


class WorkerState(StrEnum):
    STARTING = "starting"
    STALE = "stale"  # engine up, weights unproven
    HEALTHY = "healthy"
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

    @property
    def name(self) -> str:
        return f"rollout/{self.index}"


EventSink = Callable[..., None]


class RolloutFleet:
    """`rollout.workers` actors named `hone/<run>/rollout/<i>`."""

    def __init__(
        self, run_id: str, placement: Placement, policy_dir: Path, run_dir: str, on_event: EventSink
    ) -> None:
        self._run_id = run_id
        self._placement = placement
        self._config = placement.config
        self._settings = placement.engine_settings(policy_dir)
        self._run_dir = run_dir
        self._on_event = on_event
        self._changed = asyncio.Condition()
        self._repairs: set[asyncio.Task[None]] = set()
        self.catch_up: Callable[[Worker], Awaitable[None]] | None = None
        self.workers = [Worker(i, None) for i in range(self._config.rollout.workers)]

    async def start(self) -> None:
        """Load all engines; they end STALE, waiting for the first weight sync."""
        await asyncio.gather(*[self._launch(worker) for worker in self.workers])

    async def serve_as_loaded(self) -> None:
        """Let engines serve the weights that they loaded, as version 0: no learner will follow."""
        for worker in self.serving:
            worker.state, worker.policy_version = WorkerState.HEALTHY, 0
        await self.notify()

    async def rollout(self, request: RolloutRequest) -> Any:
        """Produce one group; an object reference to its encoded bytes, already complete.

        Raises `DeadlineError` when it held up `MAX_HANGS` workers, each of which is replaced, and
        `StageError` for the fault of a task or a program.
        """
        num_hangs = 0
        for _ in range(MAX_TRIES):
            worker = await self._pick()
            handle = worker.handle
            reference = handle.rollout.remote(request)
            try:
                await within(
                    reference,
                    stage="rollout",
                    what=f"{worker.name} to finish a group",
                    deadline_s=self._config.rollout.timeout_s,
                    knob="rollout.timeout_s",
                )
                worker.num_in_vain = 0
                return reference
            except RayActorError:
                self.bury(worker, handle)
            except DeadlineError:
                self.bury(worker, handle, "hangs")
                num_hangs += 1
                if num_hangs == MAX_HANGS:
                    raise
            except StageError:
                if await self._serves(worker):
                    raise  # the task's or the program's fault, which another engine would repeat
                self.bury(worker, handle)
            except asyncio.CancelledError:
                ray.cancel(reference)
                raise
            finally:
                worker.num_running -= 1
                await self.notify()
        raise StageError("rollout", f"group {request.group_id} failed on {MAX_TRIES} workers")

    async def notify(self) -> None:
        """A worker's state or load changed."""
        async with self._changed:
            self._changed.notify_all()

    @property
    def serving(self) -> list[Worker]:
        """Workers that take part in a weight sync."""
        return [w for w in self.workers if w.state in (WorkerState.HEALTHY, WorkerState.STALE)]

    def statuses(self) -> list[ActorStatus]:
        return [
            ActorStatus(name=w.name, state=w.state, policy_version=w.policy_version, pid=w.pid)
            for w in self.workers
        ]

    async def stop(self) -> None:
        for repair in self._repairs:
            repair.cancel()
        alive = [w.handle for w in self.workers if w.handle is not None]
        await asyncio.wait(
            [asyncio.ensure_future(_quietly(handle.stop.remote())) for handle in alive], timeout=5.0
        )
        for handle in alive:
            ray.kill(handle)

    async def wait_for_healthy(self) -> None:
        """Wait for a worker that can serve, within the start deadline."""
        async with self._changed:
            await within(
                self._changed.wait_for(lambda: bool(self._healthy)),
                stage="rollout",
                what="a healthy rollout worker",
                deadline_s=self._config.resources.start_timeout_s,
                knob="resources.start_timeout_s",
            )

    @property
    def has_hope(self) -> bool:
        """Some worker serves, or is being replaced."""
        return bool(self._healthy or self._repairs)

    @property
    def _healthy(self) -> list[Worker]:
        return [w for w in self.workers if w.state is WorkerState.HEALTHY]

    async def _pick(self) -> Worker:
        """The healthy worker with the fewest running groups."""
        while not self._healthy:
            await self.wait_for_healthy()
        worker = min(self._healthy, key=lambda w: w.num_running)
        worker.num_running += 1
        return worker

    async def _serves(self, worker: Worker) -> bool:
        """Whether the actor answers and its engine process lives."""
        try:
            await within(
                worker.handle.ping.remote(),
                stage="rollout",
                what=f"{worker.name} to answer",
                deadline_s=PING_S,
                knob="a fixed bound",
            )
        except (RayActorError, StageError):
            return False
        return True

    async def _launch(self, worker: Worker) -> None:
        if worker.handle is not None:
            ray.kill(worker.handle)  # what is left of the one it replaces
        actor = ray.remote(RolloutWorker)
        options = self._placement.rollout_options(worker.index)
        generation = f"{os.getpid()}.{worker.num_restarts}"  # the last controller's may linger
        worker.handle = actor.options(
            name=f"hone/{self._run_id}/rollout/{worker.index}/{generation}",
            max_concurrency=MAX_CALLS,
            **options,
        ).remote(worker.index, self._config.rollout.program, self._run_dir)
        worker.state = WorkerState.STARTING
        try:
            worker.pid = await within(
                worker.handle.start.remote(self._settings),
                stage="rollout",
                what=f"{worker.name} to load its engine",
                deadline_s=self._config.resources.start_timeout_s,
                knob="resources.start_timeout_s",
            )
        except RayActorError as error:
            raise StageError("rollout", f"{worker.name} died while loading: {error}") from error
        worker.state = WorkerState.STALE

    def bury(self, worker: Worker, handle: Any, cause: str = "died") -> None:
        """Declare the actor `handle` of a worker lost and start its replacement, once."""
        if worker.handle is not handle or worker.state in (WorkerState.DEAD, WorkerState.STARTING):
            return
        worker.state = WorkerState.DEAD
        self._on_event("worker_died", actor=worker.name, pid=worker.pid, cause=cause)
        repair = asyncio.create_task(self._replace(worker))
        self._repairs.add(repair)
        repair.add_done_callback(self._repairs.discard)

    async def _replace(self, worker: Worker) -> None:
        """Start a dead worker again, bring it to the current weights, then let it serve."""
        while worker.num_in_vain < MAX_RESTARTS:
            worker.num_restarts += 1
            worker.num_in_vain += 1
            try:
                await self._launch(worker)
                if self.catch_up is not None:
                    await self.catch_up(worker)
                self._on_event(
                    "worker_restarted", actor=worker.name, num_restarts=worker.num_restarts
                )
                return
            except StageError as error:
                logger.warning("%s could not be replaced: %s", worker.name, error)
                await asyncio.sleep(5.0 * (worker.num_in_vain - 1))
        worker.state = WorkerState.DEAD
        self._on_event("worker_retired", actor=worker.name)


async def _quietly(reference: Any) -> None:
    try:
        await reference
    except Exception:
        logger.debug("an actor was gone before it could stop", exc_info=True)
