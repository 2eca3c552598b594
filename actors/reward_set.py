"""The reward actors of one rubric version: started together, called with deadlines, drained.

Invariant: a call either returns or raises a `StageError` that names the stage; a crashed worker is
replaced and the call tried again elsewhere, which is safe because adding a group twice is a no-op.
So is a call whose worker found Redis away, for `OUTAGE_S`.
A set ends only after its last call has. Owned by `actors.reward_pool`.
"""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from actors.fleet import EventSink
from actors.placement import Placement
from actors.reward_worker import RewardWorker
from actors.stages import within
from actors.verifier_pool import PoolStatus
from actors.verifier_pools import PooledSignal, VerifierPools, longest_call_s
from cluster.config import VerifierConfig
from cluster.errors import (
    ActorLostError,
    BufferUnavailableError,
    DeadlineError,
    HoneError,
    StageError,
)
from cluster.redis_client import CALL_S, OUTAGE_S
from cluster.reward_state import RubricVersion
from cluster.run_dir import RunDir
from cluster.status import ActorStatus
from cluster.types import Task

MAX_TRIES = 3
MAX_HANGS = 2  # tries that may end at the deadline of a call
POOL_STATUS_S = 2.0
AWAY_PAUSE_S = 5.0  # before a call is made again whose worker found Redis away
CHECK_TIMEOUT_S = 120.0
NUM_GOLD_TASKS = 8
log = logging.getLogger(__name__)
_generation = itertools.count()


@dataclass(frozen=True)
class RewardHome:
    """Where reward actors of a run live and what they connect to."""

    run: RunDir
    placement: Placement
    buffer_url: str
    on_event: EventSink
    policy_dir: str = ""

    def prefix(self, label: str) -> str:
        """Of actor names: `hone/<run>/reward/<label>.<generation>`."""
        generation = f"{label or 'candidate'}.{os.getpid()}.{next(_generation)}"
        return f"hone/{self.run.buffer_id}/reward/{generation}"

    def pools(self, label: str, verifiers: dict[str, VerifierConfig]) -> VerifierPools:
        """New pools of a version, or with "" of a candidate."""
        return VerifierPools(
            self.placement, verifiers, self.prefix(label), str(self.run.path), self.policy_dir,
            is_trial=not label,
        )  # fmt: skip

    def worker(
        self,
        index: int,
        label: str,
        verifiers: dict[str, VerifierConfig],
        pooled: dict[str, PooledSignal],
    ) -> Any:
        """A new actor `<prefix>/<index>`."""
        name = f"{self.prefix(label)}/{index}"
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
                index, label, verifiers, pooled, self.run.buffer_id, self.buffer_url, buffer,
                str(self.run.path), self.policy_dir,
            )
        )  # fmt: skip


def settings_of(version: RubricVersion) -> dict[str, VerifierConfig]:
    return {name: VerifierConfig.model_validate(v) for name, v in version.verifiers.items()}


class WorkerSet:
    """`rewards.workers` actors of one version, and its verifiers' pools."""

    def __init__(self, home: RewardHome, version: RubricVersion) -> None:
        config = home.placement.config
        verifiers = settings_of(version)
        self.version = version
        self._start_s = config.resources.start_timeout_s
        self._call_s = CALL_S + config.rollout.timeout_s
        self._call_s += sum(longest_call_s(v, config) for v in verifiers.values())
        self._home = home
        self._verifiers = verifiers
        self._pools = home.pools(version.label, verifiers)
        self._pooled: dict[str, PooledSignal] = {}
        self._pool_statuses: dict[str, PoolStatus] = {}
        self._workers: list[Any] = []
        self._turn = itertools.cycle(range(config.rewards.workers))
        self._pids = [0] * config.rewards.workers
        self._notes: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_holders = 0
        self._free = asyncio.Event()
        self._free.set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def start(self) -> None:
        """Wait until every worker has built its rubric; raises `StageError`."""
        try:
            self._pooled = await self._pools.start()
            self._workers = [self._create(i) for i in range(len(self._pids))]
            facts = await within(
                asyncio.gather(*[worker.facts.remote() for worker in self._workers]),
                stage="score",
                what="reward workers to start",
                deadline_s=self._start_s,
                knob="resources.start_timeout_s",
            )
        except StageError as error:
            kind = ActorLostError if isinstance(error, ActorLostError) else StageError
            raise kind("score", f"rubric {self.version.label}: {error}") from error
        self._pids = [fact.pid for fact in facts]
        if self._pooled:
            self._note(self._watch_pools())

    async def self_check(self, tasks: list[Task]) -> None:
        """Every worker must pay gold answers and golden sets in full; raises `StageError`."""
        await asyncio.gather(*(health_check(worker, tasks, False) for worker in self._workers))

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
        started, num_deaths, num_hangs = time.monotonic(), 0, 0
        while True:
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
                num_hangs += 1
                if num_hangs == MAX_HANGS:
                    raise
            except BufferUnavailableError:
                if time.monotonic() - started > OUTAGE_S:
                    raise
                await asyncio.sleep(AWAY_PAUSE_S)
            except ActorLostError as error:
                num_deaths += 1
                if num_deaths == MAX_TRIES:
                    raise StageError("score", f"reward workers die: {error.reason}") from error
                self._replace(index, worker)
                await asyncio.sleep(1.0)

    def _create(self, index: int) -> Any:
        return self._home.worker(index, self.version.label, self._verifiers, self._pooled)

    def _replace(self, index: int, dead: Any) -> None:
        """A new worker for a dead one, unless another call has seen to it."""
        if self._workers[index] is not dead or self._is_over:
            return
        name = f"reward/{index}"
        self._home.on_event("worker_died", actor=name, pid=self._pids[index])
        ray.kill(dead)
        self._workers[index], self._pids[index] = self._create(index), 0
        self._note(self._note_start(index, name))

    def _note(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _watch_pools(self) -> None:
        num_died: dict[str, int] = {}
        while not self._is_over:
            self._pool_statuses = await self._pools.statuses()
            for name, status in self._pool_statuses.items():
                if status.num_died > num_died.get(name, 0):
                    self._home.on_event("worker_died", actor=f"reward/{name}", pid=0)
                num_died[name] = status.num_died
            await asyncio.sleep(POOL_STATUS_S)

    async def _note_start(self, index: int, name: str) -> None:
        try:
            facts = await within(
                self._workers[index].facts.remote(),
                stage="score",
                what="a reward worker to start again",
                deadline_s=self._start_s,
                knob="resources.start_timeout_s",
            )
        except HoneError:
            return  # the next call finds it dead or hanging
        self._pids[index] = facts.pid
        self._home.on_event("worker_restarted", actor=name, pid=self._pids[index])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Not drained before the block ends, also while no call is in flight."""
        self._num_holders += 1
        self._free.clear()
        try:
            yield
        finally:
            self._num_holders -= 1
            if self._num_holders == 0:
                self._free.set()

    async def drain(self) -> None:
        """Wait for who holds the set and for the calls in flight, then end the workers."""
        try:
            await self._free.wait()
            await self.until_idle()
        finally:
            self.kill()

    async def until_idle(self) -> None:
        """Wait for the calls in flight, each of which has a deadline."""
        try:
            async with asyncio.timeout(MAX_HANGS * self._call_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("rubric %s: %d calls left", self.version.label, self._in_flight)

    def kill(self) -> None:
        self._is_over = True
        for worker in self._workers:
            ray.kill(worker)
        self._pools.kill()

    def statuses(self) -> list[ActorStatus]:
        pids = {f"reward/{i}": pid for i, pid in enumerate(self._pids)}
        for name, status in self._pool_statuses.items():
            pids |= {f"reward/{name}/{i}": pid for i, pid in enumerate(status.pids)}
        return [
            ActorStatus(name=name, state="healthy" if pid else "starting", pid=pid)
            for name, pid in pids.items()
        ]


async def health_check(worker: Any, tasks: list[Task], has_junk: bool) -> list[str]:
    """Warnings of a reward worker's self-check, about junk. Raises `StageError` when it fails."""
    chosen = tasks[:: max(1, len(tasks) // NUM_GOLD_TASKS)][:NUM_GOLD_TASKS]
    try:
        rejected, warnings = await within(
            worker.self_check.remote(chosen, has_junk),
            stage="self-check",
            what="a rubric to check itself",
            deadline_s=CHECK_TIMEOUT_S,
            knob="rewards.verifiers.*.timeout_s",
        )
    except ActorLostError as error:
        raise ActorLostError("self-check", f"died in self_check: {error.reason}") from error
    if rejected:
        shown = "; ".join(rejected[:2])
        raise StageError("self-check", f"{len(rejected)} gold answers fail: {shown}")
    return warnings
