"""The fleet of rollout actors: who is healthy, who gets the next group, who is replaced.

Invariant: a worker receives work only in state HEALTHY, which it enters only after it loaded the
current weights and passed the probe. The groups of a worker that died or hangs are produced again
elsewhere; a replacement starts STALE, as does a worker that is added. One that is to leave gets no
new group. Used by the controller, `actors.weight_sync` and `actors.scaling`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray

from actors.fleet_watch import watch
from actors.fleet_worker import PING_S, Worker, WorkerState, end, finish, silence
from actors.placement import Placement
from actors.rollout import RolloutRequest
from actors.rollout_actors import RolloutActors
from actors.stages import within
from cluster.errors import ActorLostError, DeadlineError, HoneError, StageError, boundary
from cluster.status import ActorStatus

MAX_RESTARTS = 5  # of one worker without a finished group in between
MAX_TRIES = 3
MAX_HANGS = 2  # workers that one group may hold up before it is the group's fault
DRAIN_S = 30.0  # a worker that leaves may finish its groups; the rest is produced elsewhere
MAX_CROWD = 2  # times the groups that an engine was sized for; more wait here
EventSink = Callable[..., None]
logger = logging.getLogger(__name__)


class RolloutFleet:
    """`rollout.workers` actors named `hone/<run>/rollout/<i>`, and those added since."""

    def __init__(
        self, run_id: str, placement: Placement, policy_dir: Path, run_dir: str, on_event: EventSink
    ) -> None:
        self.actors = RolloutActors(run_id, placement, run_dir, on_event)
        self._config = placement.config
        self._settings = placement.engine_settings(policy_dir)
        self.engine_size = self._settings.tensor_parallel_size if placement.is_gpu else 1
        self._on_event = on_event
        per_worker = -(-self._config.max_groups_in_flight // self._config.rollout.workers)
        self._max_groups = MAX_CROWD * per_worker  # of one worker
        self._changed = asyncio.Condition()
        self.may_load = asyncio.Event()  # cleared while an engine would be in the learner's way
        self.may_load.set()
        self._next_index = self._config.rollout.workers  # an index is never used again
        self.is_started = False
        self._watching: asyncio.Task[None] | None = None
        self.catch_up: Callable[[Worker], Awaitable[None]] | None = None
        self.workers = [Worker(i, None) for i in range(self._config.rollout.workers)]

    async def start(self) -> None:
        """Load all engines; they end STALE, waiting for the first weight sync. One of them may be
        what a controller that died had prepared.
        """
        await asyncio.to_thread(self.actors.take_over)
        await asyncio.gather(*[self._begin(worker) for worker in self.workers])
        self.is_started = True
        self._watching = asyncio.create_task(watch(lambda: self.serving, self.bury))

    async def _begin(self, worker: Worker) -> None:
        """Once more where an actor is lost: for that not all parts of the run start anew."""
        try:
            await self._launch(worker)
        except ActorLostError as error:
            self._on_event("worker_died", actor=worker.name, pid=worker.pid, cause=error.reason)
            worker.num_restarts += 1
            await self._launch(worker)

    async def add(self, place: str) -> Worker:
        """One more worker, in the bundles `place`: it loads, takes the current weights, is probed,
        and serves when this returns. Raises `StageError` when it cannot, and is gone again.
        """
        worker = Worker(self._next_index, None, place=place)
        self._next_index += 1
        self.workers.append(worker)
        try:
            await self._launch(worker)
            if self.catch_up is not None:
                await self.catch_up(worker)
        except BaseException:
            await self._dismiss(worker)
            raise
        return worker

    async def remove(self) -> Worker:
        """End the worker that is missed least. What it has not finished in `DRAIN_S` is produced
        elsewhere.
        """
        worker = min(
            self.staying, key=lambda w: (w.state is WorkerState.HEALTHY, w.num_running, -w.index)
        )
        worker.is_leaving = True
        async with self._changed:
            try:
                async with asyncio.timeout(DRAIN_S):
                    await self._changed.wait_for(lambda: worker.num_running == 0)
            except TimeoutError:
                logger.info("%s gives %d groups back", worker.name, worker.num_running)
        await self._dismiss(worker)
        return worker

    @property
    def staying(self) -> list[Worker]:
        return [w for w in self.workers if not w.is_leaving]

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
                await finish(worker, reference, self._config.rollout.timeout_s, self._changed)
                worker.num_in_vain = 0
                return reference
            except ActorLostError as error:
                self.bury(worker, handle, error.reason)
            except DeadlineError:
                self.bury(worker, handle, "hangs")
                num_hangs += 1
                if num_hangs == MAX_HANGS:
                    raise
            except StageError:
                if not worker.is_leaving and await silence(worker) is None:
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
        """Workers that take part in a weight sync; one in repair catches up by itself."""
        states = (WorkerState.HEALTHY, WorkerState.STALE)
        return [w for w in self.staying if w.state in states and not w.is_in_repair]

    def statuses(self) -> list[ActorStatus]:
        return [w.status() for w in self.workers]

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for worker in self.workers:
            if worker.repair is not None:
                worker.repair.cancel()
        self.actors.end()
        await end([worker.handle for worker in self.workers])

    async def wait_for_healthy(self) -> None:
        """Wait for a worker that can serve, through all tries to replace one. Raises `StageError`
        as soon as none is to come.
        """
        try_s = self._config.resources.start_timeout_s + self._config.sync.timeout_s
        async with self._changed:
            await within(
                self._changed.wait_for(lambda: self._healthy or not self.has_hope),
                stage="rollout",
                what="a healthy rollout worker",
                deadline_s=MAX_RESTARTS * try_s,
                knob="resources.start_timeout_s",
            )
        if not self.has_hope:
            raise StageError("rollout", "no rollout worker is left, and none is to come")

    @property
    def has_hope(self) -> bool:
        """Some worker serves, or is on its way to that."""
        lost = (WorkerState.QUARANTINED, WorkerState.DEAD)
        return any(w.state not in lost or w.is_in_repair for w in self.staying)

    @property
    def _healthy(self) -> list[Worker]:
        return [w for w in self.staying if w.state is WorkerState.HEALTHY]

    @property
    def _well(self) -> list[Worker]:
        states = (WorkerState.HEALTHY, WorkerState.ASLEEP)
        return [w for w in self.staying if w.state in states]

    @property
    def _free(self) -> list[Worker]:
        return [w for w in self._healthy if w.num_running < self._max_groups]

    async def _pick(self) -> Worker:
        """The healthy worker with the fewest running groups. While all are crowded it waits, as
        long as groups come back: each does, finished or not, within `rollout.timeout_s` in which no
        sync holds its worker. While all sleep or none may load it waits for the learner, whose
        calls have deadlines of their own.
        """
        while not (free := self._free):
            if not self._well:
                await self.may_load.wait()
                await self.wait_for_healthy()
                continue
            async with self._changed:
                if not self._healthy:
                    await self._changed.wait_for(lambda: self._healthy or not self._well)
                elif not self._free:
                    try:
                        await within(
                            self._changed.wait(),
                            stage="rollout",
                            what="any group to come back from rollout workers that are all crowded",
                            deadline_s=self._config.rollout.timeout_s + 2 * PING_S,
                            knob="rollout.timeout_s",
                        )
                    except DeadlineError:
                        if self._healthy:
                            raise
        worker = min(free, key=lambda w: w.num_running)
        worker.num_running += 1
        return worker

    async def _launch(self, worker: Worker) -> None:
        if worker.handle is not None:
            ray.kill(worker.handle)  # what is left of the one it replaces
        await self.may_load.wait()
        worker.handle = (
            self.actors.replacement(worker, is_last=not self._healthy)
            if worker.num_in_vain == 1 or not self.is_started  # a first try since its last group
            else self.actors.make(worker)
        )
        worker.state = WorkerState.STARTING
        worker.pid = await within(
            worker.handle.start.remote(worker.index, self._settings),
            stage="rollout",
            what=f"{worker.name} to load its engine",
            deadline_s=self._config.resources.start_timeout_s,
            knob="resources.start_timeout_s",
        )
        worker.state = WorkerState.STALE

    def bury(self, worker: Worker, handle: Any, cause: str = "died") -> None:
        """Declare the actor `handle` of a worker lost and start its replacement, once."""
        if worker.handle is not handle or worker.state is WorkerState.DEAD or worker.is_leaving:
            return
        worker.state = WorkerState.DEAD
        self._on_event("worker_died", actor=worker.name, pid=worker.pid, cause=cause)
        if not worker.is_in_repair:  # or its repair sees to it
            worker.repair = asyncio.create_task(self._replace(worker))
            worker.repair.add_done_callback(self._repaired)

    def _repaired(self, _repair: asyncio.Task[None]) -> None:
        if not any(w.is_in_repair for w in self.workers):
            self.actors.stand_by_again()

    async def _dismiss(self, worker: Worker) -> None:
        """End a worker for good."""
        worker.is_leaving = True
        if worker.repair is not None:
            worker.repair.cancel()
        await end([worker.handle])
        worker.state = WorkerState.DEAD
        if worker in self.workers:
            self.workers.remove(worker)
        await self.notify()

    async def _replace(self, worker: Worker) -> None:
        """Start a dead worker again, bring it to the current weights, then let it serve."""
        while worker.num_in_vain < MAX_RESTARTS:
            worker.num_restarts += 1
            worker.num_in_vain += 1
            try:
                with boundary("rollout"):  # what Ray raises costs a try, too
                    await self._launch(worker)
                    if self.catch_up is not None:
                        await self.catch_up(worker)
                if worker.state is WorkerState.DEAD:
                    raise StageError("rollout", f"{worker.name} died as soon as it served")
                self._on_event(
                    "worker_restarted", actor=worker.name, num_restarts=worker.num_restarts
                )
                return
            except HoneError as error:
                logger.warning("%s could not be replaced: %s", worker.name, error)
                await asyncio.sleep(5.0 * (worker.num_in_vain - 1))
        worker.state, worker.repair = WorkerState.DEAD, None
        self._on_event("worker_retired", actor=worker.name)
        await self.notify()
        await end([worker.handle])
