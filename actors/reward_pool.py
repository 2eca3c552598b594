"""The live rubric as the controller sees it: score a group, whichever version is live.

Invariant: a group is scored by one version from start to end; a cut-over is one assignment between
two groups, which no group waits for: groups under way finish with the version they began with. The
version before the live one stays warm, so that a rollback is as fast. Owned by the controller's
parts; versions are changed by `actors.reward_admin` only.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from actors.reward_candidate import Candidate
from actors.reward_set import RewardHome, WorkerSet
from actors.reward_worker import GroupSummary
from cluster.errors import ActorLostError, DeadlineError, HoneError, StageError
from cluster.reward_state import RubricVersion
from cluster.status import ActorStatus
from cluster.types import Task

log = logging.getLogger(__name__)


class RewardPool:
    """Reward workers of the live version, of the one before, and perhaps a shadow."""

    def __init__(self, home: RewardHome) -> None:
        self.home = home
        self.shadow: Candidate | None = None
        self.epoch = -1  # of the controller: groups are added in its name
        self._config = home.placement.config
        self._live: WorkerSet | None = None
        self._previous: WorkerSet | None = None
        self._draining: set[asyncio.Task[None]] = set()

    async def score_and_add(
        self, group: Any, must_solve: bool = False, failed: Any = None
    ) -> GroupSummary:
        """`group` is the encoded group or an object reference to it, which never passes through
        here; so is `failed`. See `RewardWorker.score_and_add`.
        """
        summary = await self._set().call(
            "score_and_add",
            group,
            self._config.tasks.skip_uniform,
            self._config.rollout.timeout_s,
            self.epoch,
            must_solve,
            failed,
        )
        if self.shadow is not None and failed is None:
            self.shadow.offer(group, summary)
        return summary

    async def score(self, group: Any) -> tuple[GroupSummary, bytes]:
        return await self._set().call("score", group)

    @contextmanager
    def one_version(self) -> Iterator[Callable[[Any], Awaitable[tuple[GroupSummary, bytes]]]]:
        """Scoring by the version that is live now, for the whole block, whatever goes live."""
        workers = self._set()

        async def score(group: Any) -> tuple[GroupSummary, bytes]:
            return await workers.call("score", group)

        with workers.held():
            yield score

    @property
    def live(self) -> RubricVersion:
        return self._set().version

    async def prepare(self, version: RubricVersion, tasks: list[Task]) -> WorkerSet:
        """Workers of `version`, idle, all of them healthy: the warm ones where these are.

        Raises `StageError` when one does not start or fails a gold answer; the live ones stay.
        """
        warm = self._previous
        if warm is not None and warm.version.label == version.label:
            try:
                await warm.self_check(tasks)
                return warm
            except (
                ActorLostError,
                DeadlineError,
            ) as error:  # ended at the cut-over
                log.warning("the warm workers of rubric %s are lost: %s", version.label, error)
        workers = WorkerSet(self.home, version)
        try:
            await workers.start()
            await workers.self_check(tasks)
        except HoneError:
            workers.kill()
            raise
        return workers

    def discard(self, workers: WorkerSet) -> None:
        """End workers that were prepared and will not go live, unless they are the warm ones."""
        if workers is not self._previous:
            workers.kill()

    def cut_over(self, workers: WorkerSet) -> WorkerSet | None:
        """New groups go to `workers`; all but the version before, which is returned, are drained
        and ended.
        """
        retired, self._previous, self._live = self._previous, self._live, workers
        if retired is not None and retired is not workers:
            task = asyncio.create_task(retired.drain())
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)
        return self._previous

    def statuses(self) -> list[ActorStatus]:
        return self._live.statuses() if self._live else []

    def stop(self) -> None:
        """End all reward actors."""
        for task in self._draining:
            task.cancel()
        for workers in (self._live, self._previous):
            if workers is not None:
                workers.kill()
        if self.shadow is not None:
            self.shadow.close()

    def _set(self) -> WorkerSet:
        if self._live is None:
            raise StageError("score", "reward workers must be started first")
        return self._live
