"""The actors of one verifier, between their bounds: who scores the next group, who is replaced.

Invariant: a worker has at most `max_in_flight` groups, the others wait in order; a group is scored
by one worker, and tried again on another when that one dies or hangs. Every worker has the version
of the first. A call ends in verdicts or in a `StageError`, which makes its signal abstain. One
actor per verifier and rubric version, created by `actors.verifier_pools`; its workers die with it.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray

from actors.stages import last_line, within
from actors.verifier_worker import SignalFacts, VerifierWorker
from cluster import log as logs
from cluster.config import PoolConfig, VerifierConfig
from cluster.errors import ActorLostError, DeadlineError, HoneError, StageError
from cluster.types import Verdict
from rewards.isolation import START_TIMEOUT_S

MAX_TRIES = 3
GRACE_S = 10.0  # of a worker beyond the verifier's own time limit
RETRY_START_S = 30.0  # after a worker that could not start
log = logging.getLogger(__name__)


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of a pool, and what it went through since its start."""

    pids: list[int]
    num_starting: int = 0
    in_flight: int = 0
    waiting: int = 0
    num_died: int = 0
    num_retried: int = 0
    most_workers: int = 0
    most_in_flight: int = 0  # of one worker


@dataclass(eq=False)
class _Member:
    actor: Any
    pid: int = 0  # 0 until it has started
    in_flight: int = 0
    idle_since: float = field(default_factory=time.monotonic)


class VerifierPool:
    """`options` are Ray's for each worker; `queue_s` bounds the wait for one, `start_s` its start.

    A worker beyond the lower bound ends after `idle_s` without work.
    """

    def __init__(
        self,
        name: str,
        config: VerifierConfig,
        options: dict[str, Any],
        run_dir: str,
        policy_dir: str,
        queue_s: float,
        start_s: float,
        idle_s: float,
    ) -> None:
        logs.setup(f"pool-{name}", run_dir)
        assert config.pool
        self._name = name
        self._config = config
        self._pool: PoolConfig = config.pool
        self._options = options
        self._places = run_dir, policy_dir
        self._queue_s = queue_s
        self._start_s = start_s
        self._idle_s = idle_s
        self._members: list[_Member] = []
        self._facts: SignalFacts | None = None
        self._waiting = 0
        self._counts = {"died": 0, "retried": 0, "workers": 0, "in_flight": 0}
        self._no_start_before = 0.0
        self._changed = asyncio.Condition()
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> SignalFacts:
        """Start the least number of workers. Raises `StageError` with what the first one said."""
        async with self._starting:
            if self._facts is None:
                missing = self._pool.bounds[0] - len(self._members)
                await asyncio.gather(*(self._join(self._create()) for _ in range(missing)))
                self._spawn(self._shrink())
        assert self._facts
        return self._facts

    async def score(self, group: list[Any]) -> list[Verdict]:
        """Verdicts of a group, which comes as an object reference in a list: it does not pass
        through here.
        """
        await self.start()  # where this actor is itself a replacement
        for attempt in range(MAX_TRIES):
            member = await self._take()
            try:
                return await within(
                    member.actor.score.remote(*group),
                    stage=self._stage,
                    what="a worker to score a group",
                    deadline_s=call_s(self._config),
                    knob=f"{self._stage}.timeout_s",
                )
            except (ActorLostError, DeadlineError) as error:
                self._bury(member, error)
                if attempt == MAX_TRIES - 1:
                    kind = DeadlineError if isinstance(error, DeadlineError) else StageError
                    raise kind(
                        self._stage, f"the workers of {MAX_TRIES} tries died: {last_line(error)}"
                    ) from None
                self._counts["retried"] += 1
            finally:
                await self._release(member)
        raise AssertionError("unreachable")

    async def status(self) -> PoolStatus:
        return PoolStatus(
            pids=[m.pid for m in self._members if m.pid],
            num_starting=sum(not m.pid for m in self._members),
            in_flight=sum(m.in_flight for m in self._members),
            waiting=self._waiting,
            num_died=self._counts["died"],
            num_retried=self._counts["retried"],
            most_workers=self._counts["workers"],
            most_in_flight=self._counts["in_flight"],
        )

    @property
    def _stage(self) -> str:
        return f"rewards.verifiers.{self._name}"

    async def _take(self) -> _Member:
        """The worker with the fewest groups; waits for a place, and asks for more workers."""
        self._waiting += 1
        self._grow()
        try:
            async with asyncio.timeout(self._queue_s), self._changed:
                await self._changed.wait_for(lambda: self._free() is not None)
                member = self._free()
                assert member
                member.in_flight += 1
                self._counts["in_flight"] = max(self._counts["in_flight"], member.in_flight)
                return member
        except TimeoutError:
            raise DeadlineError(
                self._stage, f"no worker was free in {self._queue_s:.0f} s ({self._stage}.pool)"
            ) from None
        finally:
            self._waiting -= 1

    def _free(self) -> _Member | None:
        free = [m for m in self._members if m.pid and m.in_flight < self._pool.max_in_flight]
        return min(free, key=lambda m: m.in_flight, default=None)

    async def _release(self, member: _Member) -> None:
        async with self._changed:
            member.in_flight -= 1
            member.idle_since = time.monotonic()
            self._changed.notify()

    def _bury(self, member: _Member, error: Exception) -> None:
        """Forget a worker that died or hangs; other calls to it fail or end by themselves."""
        if member in self._members:
            log.warning("%s: worker %d is lost: %s", self._stage, member.pid, last_line(error))
            self._members.remove(member)
            self._counts["died"] += 1
            ray.kill(member.actor)
        self._grow()

    def _grow(self) -> None:
        """As many workers as the groups at hand need, within the bounds."""
        low, high = self._pool.bounds
        load = self._waiting + sum(m.in_flight for m in self._members)
        wanted = min(high, max(low, -(-load // self._pool.max_in_flight)))
        if time.monotonic() >= self._no_start_before:
            for _ in range(wanted - len(self._members)):
                self._spawn(self._join_later(self._create()))

    def _create(self) -> _Member:
        actor = (
            ray.remote(VerifierWorker)
            .options(**self._options)
            .remote(self._name, self._config, *self._places)
        )
        member = _Member(actor)
        self._members.append(member)
        return member

    async def _join_later(self, member: _Member) -> None:
        try:
            await self._join(member)
        except HoneError as error:
            self._no_start_before = time.monotonic() + RETRY_START_S
            log.warning("%s: no further worker: %s", self._stage, error)
            await asyncio.sleep(RETRY_START_S)
            self._grow()  # who waits does not ask again

    async def _join(self, member: _Member) -> None:
        """Let a new worker take groups once it has started as the version of the others."""
        try:
            facts = await within(
                member.actor.facts.remote(),
                stage=self._stage,
                what="a worker of its pool to start",
                deadline_s=self._start_s,
                knob=f"resources.start_timeout_s, {self._stage}.pool",
            )
            if self._facts is not None and facts.version != self._facts.version:
                raise StageError(self._stage, "its code has changed on disk: swap to the new one")
        except HoneError as error:
            self._members.remove(member)
            ray.kill(member.actor)
            kind = ActorLostError if isinstance(error, ActorLostError) else StageError
            raise kind(self._stage, last_line(error)) from error
        async with self._changed:
            self._facts = self._facts or facts
            member.pid, member.idle_since = facts.pid, time.monotonic()
            self._counts["workers"] = max(self._counts["workers"], len(self._members))
            self._changed.notify_all()

    async def _shrink(self) -> None:
        while True:
            await asyncio.sleep(self._idle_s / 4)
            before = time.monotonic() - self._idle_s
            idle = [m for m in self._members if m.pid and not m.in_flight and m.idle_since < before]
            for member in idle[: max(0, len(self._members) - self._pool.bounds[0])]:
                self._members.remove(member)
                ray.kill(member.actor)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def call_s(config: VerifierConfig) -> float:
    """The longest that a worker may take for a group, with the start of its check processes."""
    return config.timeout_s + START_TIMEOUT_S + GRACE_S
