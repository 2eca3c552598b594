"""The pool of reward actors as the controller sees it: calls with deadlines, spread over the
workers.

Invariant: a call either returns a summary or raises a `StageError` that names the stage; a
crashed worker is restarted by Ray and the call tried again elsewhere, which is safe because
adding a group twice is a no-op.
"""

import asyncio
import itertools
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.placement import Placement
from actors.reward_worker import GroupSummary, RewardWorker
from actors.stages import within
from cluster.errors import StageError
from cluster.status import ActorStatus

MAX_TRIES = 3


class RewardPool:
    """`rewards.workers` actors named `hone/<run>/reward/<i>`."""

    def __init__(self, run_id: str, placement: Placement, buffer_url: str, run_dir: str) -> None:
        config = placement.config
        self._config = config
        self._call_s = 60.0 + sum(v.timeout_s for v in config.rewards.verifiers.values())
        actor = ray.remote(RewardWorker)
        self._workers = [
            actor.options(
                name=f"hone/{run_id}/reward/{i}", max_concurrency=64, **placement.reward_options()
            ).remote(i, config.rewards.verifiers, run_id, buffer_url, config.buffer, run_dir)
            for i in range(config.rewards.workers)
        ]
        self._turn = itertools.cycle(range(len(self._workers)))
        self._pids = [0] * len(self._workers)

    async def start(self) -> None:
        deadline_s = self._config.resources.start_timeout_s
        self._pids = await within(
            asyncio.gather(*[worker.ping.remote() for worker in self._workers]),
            stage="score",
            what="reward workers to start",
            deadline_s=deadline_s,
            knob="resources.start_timeout_s",
        )

    async def score_and_add(self, group: Any) -> GroupSummary:
        """`group` is the encoded group or an object reference to it, which never passes through
        here.
        """
        return await self._call(
            "score_and_add", group, self._config.tasks.skip_uniform, self._config.rollout.timeout_s
        )

    async def score(self, group: Any) -> tuple[GroupSummary, bytes]:
        return await self._call("score", group)

    async def _call(self, method: str, *arguments: Any) -> Any:
        for attempt in range(MAX_TRIES):
            worker = self._workers[next(self._turn)]
            try:
                return await within(
                    getattr(worker, method).remote(*arguments),
                    stage="score",
                    what=f"a reward worker to {method}",
                    deadline_s=self._call_s + self._config.rollout.timeout_s,
                    knob="rewards.verifiers.*.timeout_s",
                )
            except RayActorError as error:
                if attempt == MAX_TRIES - 1:
                    raise StageError("score", f"reward workers keep dying: {error}") from error
                await asyncio.sleep(1.0)
        raise AssertionError("unreachable")

    def statuses(self) -> list[ActorStatus]:
        return [
            ActorStatus(name=f"reward/{i}", state="healthy" if pid else "starting", pid=pid)
            for i, pid in enumerate(self._pids)
        ]
