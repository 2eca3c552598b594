"""The reward actors of one rubric version: started together, called with deadlines, drained.

Invariant: a call either returns or raises a `StageError` that names the stage; a crashed worker is
replaced and the call tried again elsewhere, which is safe because adding a group twice is a no-op.
A set ends only after its last call has. Owned by `actors.reward_pool`.
"""

import asyncio
import itertools
import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.fleet import EventSink
from actors.placement import Placement
from actors.reward_worker import RewardWorker
from actors.stages import within
from cluster.config import VerifierConfig
from cluster.errors import DeadlineError, StageError
from cluster.reward_state import RubricVersion
from cluster.run_dir import RunDir
from cluster.status import ActorStatus

MAX_TRIES = 3
log = logging.getLogger(__name__)
_generation = itertools.count()


@dataclass(frozen=True)
class RewardHome:
    """Where reward actors of a run live and what they connect to."""

    run: RunDir
    placement: Placement
    buffer_url: str
    on_event: EventSink

    def worker(self, index: int, label: str, verifiers: dict[str, VerifierConfig]) -> Any:
        """A new actor `hone/<run>/reward/<label>.<generation>/<index>`."""
        generation = f"{label or 'candidate'}.{os.getpid()}.{next(_generation)}"
        name = f"hone/{self.run.name}/reward/{generation}/{index}"
        options = self.placement.reward_options() | {
            "name": name,
            "max_concurrency": 64,
            "max_restarts": 0,  # replaced by the set: Ray would restart a broken start for ever
        }
        buffer = self.placement.config.buffer
        return (
            ray.remote(RewardWorker)
            .options(**options)
            .remote(
                index, label, verifiers, self.run.name, self.buffer_url, buffer, str(self.run.path)
            )
        )


def settings_of(version: RubricVersion) -> dict[str, VerifierConfig]:
    return {name: VerifierConfig.model_validate(v) for name, v in version.verifiers.items()}


class WorkerSet:
    """`rewards.workers` actors of one version."""

    def __init__(self, home: RewardHome, version: RubricVersion) -> None:
        config = home.placement.config
        verifiers = settings_of(version)
        self.version = version
        self._start_s = config.resources.start_timeout_s
        self._call_s = 60.0 + config.rollout.timeout_s
        self._call_s += sum(v.timeout_s for v in verifiers.values())
        self._home = home
        self._verifiers = verifiers
        self._workers = [self._create(i) for i in range(config.rewards.workers)]
        self._turn = itertools.cycle(range(len(self._workers)))
        self._pids = [0] * len(self._workers)
        self._notes: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def start(self) -> None:
        """Wait until every worker has built its rubric; raises `StageError`, and leaves none."""
        try:
            facts = await within(
                asyncio.gather(*[worker.facts.remote() for worker in self._workers]),
                stage="score",
                what="reward workers to start",
                deadline_s=self._start_s,
                knob="resources.start_timeout_s",
            )
        except (StageError, RayActorError) as error:
            self.kill()
            raise StageError("score", f"rubric {self.version.label}: {error}") from error
        self._pids = [fact.pid for fact in facts]

    async def call(self, method: str, *arguments: Any) -> Any:
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._try(method, arguments)
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def _try(self, method: str, arguments: tuple[Any, ...]) -> Any:
        for attempt in range(MAX_TRIES):
            index = next(self._turn)
            worker = self._workers[index]
            try:
                return await within(
                    getattr(worker, method).remote(*arguments),
                    stage="score",
                    what=f"a reward worker to {method}",
                    deadline_s=self._call_s,
                    knob="rewards.verifiers.*.timeout_s",
                )
            except DeadlineError:
                self._replace(index, worker)  # it hangs; its verifiers have their own deadlines
                raise
            except RayActorError as error:
                if attempt == MAX_TRIES - 1:
                    raise StageError("score", f"reward workers keep dying: {error}") from error
                self._replace(index, worker)
                await asyncio.sleep(1.0)
        raise AssertionError("unreachable")

    def _create(self, index: int) -> Any:
        return self._home.worker(index, self.version.label, self._verifiers)

    def _replace(self, index: int, dead: Any) -> None:
        """A new worker for a dead one, unless another call has seen to it."""
        if self._workers[index] is not dead or self._is_over:
            return
        name = f"reward/{index}"
        self._home.on_event("worker_died", actor=name, pid=self._pids[index])
        ray.kill(dead)
        self._workers[index], self._pids[index] = self._create(index), 0
        task = asyncio.create_task(self._note_start(index, name))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _note_start(self, index: int, name: str) -> None:
        try:
            self._pids[index] = (await self._workers[index].facts.remote()).pid
        except RayActorError:
            return  # the next call finds it dead
        self._home.on_event("worker_restarted", actor=name, pid=self._pids[index])

    async def drain(self) -> None:
        """Wait for the calls in flight, then end the workers."""
        try:
            async with asyncio.timeout(self._call_s):  # each call has the same deadline
                await self._idle.wait()
        except TimeoutError:
            log.warning("rubric %s: %d calls left", self.version.label, self._in_flight)
        finally:
            self.kill()

    def kill(self) -> None:
        self._is_over = True
        for worker in self._workers:
            ray.kill(worker)

    def statuses(self) -> list[ActorStatus]:
        return [
            ActorStatus(name=f"reward/{i}", state="healthy" if pid else "starting", pid=pid)
            for i, pid in enumerate(self._pids)
        ]
