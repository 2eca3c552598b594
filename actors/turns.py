"""Learner and engines by turns on the GPUs that they share (`resources.layout` alternating).

Invariant: while gradients are made every engine is asleep, its GPU memory given back, or ended, and
none is loaded in place of one that is lost; whoever asks for a group then waits, and when
engines are awake the learner keeps of the GPUs what it needs between steps, and no more. Only for
`rollout.max_policy_age` 0, where nobody has anything to do while the other works. Made by
`actors.bring_up`; the learner group takes its turn by itself, `actors.gathering` and
`actors.weight_sync` end it.
"""

import asyncio
from contextlib import suppress
from typing import Any

import ray

from actors.fleet import RolloutFleet
from actors.fleet_worker import Worker, WorkerState
from actors.stages import within
from cluster.errors import StageError
from learners.group import LearnerGroup


class Turns:
    """Engines are awake at first. `timeout_s` is for one to finish its groups and fall asleep,
    `start_timeout_s`, if that is longer, for one that loads to catch up.
    """

    def __init__(
        self, learner: LearnerGroup, fleet: RolloutFleet, timeout_s: float, start_timeout_s: float
    ) -> None:
        self._learner = learner
        self._fleet = fleet
        self._timeout_s = timeout_s
        self._load_s = max(timeout_s, start_timeout_s)
        self._change = asyncio.Lock()
        self._is_learners = False
        learner.take_gpus, learner.rest = self.to_learner, self.to_engines

    async def to_learner(self) -> None:
        """Returns when the engines sleep; one that does not, or loads for too long, is ended, and
        replaced when the turn is over.
        """
        async with self._change:
            if self._is_learners:
                return
            self._is_learners = True
            with suppress(TimeoutError):
                async with asyncio.timeout(self._load_s):
                    while loading := self._loading():
                        await asyncio.wait([w.repair for w in loading if w.repair])
            self._fleet.may_load.clear()
            for worker in self._loading():
                if worker.state not in (WorkerState.HEALTHY, WorkerState.DEAD):
                    self._end(worker, worker.handle, "did not load in time")
            await self._all(WorkerState.HEALTHY, "sleep", WorkerState.ASLEEP)

    async def to_engines(self) -> None:
        """Returns when they serve again. Raises `LearnerLostError`, and is called again then."""
        async with self._change:
            if not self._is_learners:
                return
            await self._learner.call("give_memory_back")
            self._fleet.may_load.set()
            await self._all(WorkerState.ASLEEP, "wake", WorkerState.HEALTHY)
            self._is_learners = False

    def _loading(self) -> list[Worker]:
        return [w for w in self._fleet.staying if w.is_in_repair]

    async def _all(self, before: WorkerState, method: str, after: WorkerState) -> None:
        """Those that are leaving, too: they may still have groups in hand."""
        workers = [(w, w.handle) for w in self._fleet.workers if w.state is before]
        await asyncio.gather(*[self._move(w, handle, method, after) for w, handle in workers])
        await self._fleet.notify()

    async def _move(self, worker: Worker, handle: Any, method: str, after: WorkerState) -> None:
        worker.state = WorkerState.ASLEEP  # gets no group from now on
        try:
            await within(
                getattr(handle, method).remote(),
                stage="rollout",
                what=f"{worker.name} to {method}",
                deadline_s=self._timeout_s,
                knob="rollout.timeout_s",
            )
        except StageError as error:
            self._end(worker, handle, f"did not {method}: {error.reason}")
        else:
            if worker.handle is handle and worker.state is WorkerState.ASLEEP:
                worker.state = after

    def _end(self, worker: Worker, handle: Any, cause: str) -> None:
        """Its repair, unless it is leaving, waits until engines may load."""
        self._fleet.bury(worker, handle, cause)
        ray.kill(handle)
