"""Weights from the learner to all serving engines in one broadcast.

Invariant: a group serves until its members change or something in it fails, never longer; every
call ends, and tells for each engine whether it has the weights. Rank 0 is the learner's rank 0,
worker r of the e-th engine rank 1 + e * t + r, with t workers an engine. Called by
`actors.weight_sync`, which sees to the engines that came away without.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from actors.fleet import EventSink
from actors.fleet_worker import PING_S, Worker
from actors.stages import within
from cluster.config import SyncSection
from cluster.errors import LearnerLostError, StageError
from learners.group import LearnerGroup

ANSWER_S = 10.0  # beyond the deadline, in which members notice that a transfer has broken off


class WeightBroadcast:
    """Holds a group from one sync to the next. `engine_size` is t."""

    def __init__(
        self, config: SyncSection, learner: LearnerGroup, engine_size: int, on_event: EventSink
    ) -> None:
        # The learner's own deadline, past which it would count as lost, has to come later.
        self._timeout_s = min(config.timeout_s, learner.settings.timeout_s / 2)
        self._learner = learner
        self._engine_size = engine_size
        self._on_event = on_event
        self._members: list[Any] = []  # handles: learner rank 0, then engines
        self._update: dict[str, Any] = {}

    async def send(
        self, workers: Sequence[Worker], policy_version: int
    ) -> list[float | StageError]:
        """For each worker the seconds of its pause, or why it has not got the weights: a
        `DeadlineError` if it hangs. Raises `LearnerLostError`.
        """
        # One that died unseen would keep all others waiting until the deadline.
        pings = await _all(*[self._call(worker, "ping", deadline_s=PING_S) for worker in workers])
        alive = [
            worker
            for worker, ping in zip(workers, pings, strict=True)
            if not isinstance(ping, StageError)
        ]
        sent = iter(await self._send(alive, policy_version) if alive else [])
        return [
            StageError("sync", ping.reason) if isinstance(ping, StageError) else next(sent)
            for ping in pings
        ]

    async def _send(
        self, workers: Sequence[Worker], policy_version: int
    ) -> list[float | StageError]:
        members = [self._learner.ranks[0], *[worker.handle for worker in workers]]
        has_met = members == self._members
        self._members = []  # until all is well
        results: list[Any] = [] if has_met else await self._meet(workers)
        failures = [result for result in results if isinstance(result, StageError)]
        if failures:
            not_met = StageError("sync", f"the group did not meet: {failures[0]}")
            results = [r if isinstance(r, StageError) else not_met for r in results]
        else:
            calls = [
                self._call(worker, "load_weights", self._update, policy_version)
                for worker in workers
            ]
            results = await _all(self._learner.broadcast(), *calls)
            failures = [result for result in results if isinstance(result, StageError)]
        if failures:
            cause = str(failures[0])
            self._on_event("broadcast_failed", policy_version=policy_version, cause=cause)
        else:
            self._members = members
        return results[1:]

    async def _meet(self, workers: Sequence[Worker]) -> list[Any]:
        """Make a group of the learner and `workers`; its result first, then theirs."""
        size = 1 + len(workers) * self._engine_size
        [opened] = await _all(self._learner.open_broadcast(self._timeout_s))
        if isinstance(opened, StageError):
            return [opened] * (1 + len(workers))
        host, port = opened
        place = {"size": size, "host": host, "port": port, "timeout_s": self._timeout_s}
        calls = [
            self._call(
                worker, "join_broadcast", {**place, "rank_offset": 1 + i * self._engine_size}
            )
            for i, worker in enumerate(workers)
        ]
        update, *joined = await _all(self._learner.join_broadcast(size), *calls)
        if not isinstance(update, StageError):
            self._update = update
        return [update, *joined]

    def _call(
        self, worker: Worker, method: str, *arguments: object, deadline_s: float | None = None
    ) -> Awaitable[Any]:
        return within(
            getattr(worker.handle, method).remote(*arguments),
            stage="sync",
            what=f"{worker.name} to {method}",
            deadline_s=deadline_s or self._timeout_s + ANSWER_S,
            knob="sync.timeout_s" if deadline_s is None else "a fixed bound",
        )


async def _all(*calls: Awaitable[Any]) -> list[Any]:
    """The results of all, `StageError`s among them; any other error once all have ended, and a
    learner that is lost, which no engine can make up for.
    """
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, LearnerLostError):
            raise result
        if isinstance(result, BaseException) and not isinstance(result, StageError):
            raise result
    return results
