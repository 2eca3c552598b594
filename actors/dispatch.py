"""Admission of groups: one producer per slot, from a task to a scored group in the buffer.

Invariant: a slot is taken before a group is drawn, and a group that will not come to the learner
gives it back at once, through `drop` and with a reason. Owned by the controller.
"""

import asyncio

from actors.bookkeeping import Bookkeeping
from actors.bring_up import Parts
from actors.fleet_worker import oldest_version
from actors.gathering import Drop
from actors.producer import Producer
from actors.rollout import RolloutRequest
from actors.stages import Stages
from actors.staleness import StalenessPolicy
from actors.statistics import RolloutStatistics
from actors.supervisor import Supervisor
from cluster.config import Config
from cluster.errors import HoneError


class Dispatch:
    """Runs beside learning, with a task per group: the slots bound what is under way."""

    def __init__(
        self,
        config: Config,
        books: Bookkeeping,
        stages: Stages,
        slots: StalenessPolicy,
        supervisor: Supervisor,
        statistics: RolloutStatistics,
        drop: Drop,
    ) -> None:
        self._config = config
        self._books = books
        self._stages = stages
        self._slots = slots
        self._supervisor = supervisor
        self._statistics = statistics
        self._drop = drop
        self._tasks: set[asyncio.Task[None]] = set()
        self._producing: set[str] = set()

    def producing(self) -> set[str]:
        """Groups under way from their task to the buffer."""
        return set(self._producing)

    def start(self, parts: Parts, group: asyncio.TaskGroup) -> None:
        """In `group`, which a failure ends, until `stop`."""
        self._keep(group.create_task(self._admit(parts, group)))

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _admit(self, parts: Parts, group: asyncio.TaskGroup) -> None:
        """One group per free slot."""
        program = self._config.rollout.program
        producer = Producer(program, parts.fleet, parts.rewards, self._stages)
        while True:
            with self._stages.wait("dispatch", "a free slot (rollout.max_policy_age)"):
                await self._slots.admit()
            held = oldest_version(parts.fleet.staying)
            request = parts.curriculum.next(self._books.policy_version if held is None else held)
            self._producing.add(request.group_id)
            producing = group.create_task(self._produce(parts, producer, request))
            producing.add_done_callback(
                lambda _, group_id=request.group_id: self._producing.discard(group_id)
            )
            self._keep(producing)

    async def _produce(self, parts: Parts, producer: Producer, request: RolloutRequest) -> None:
        """One group from task to buffer; a dropped group frees its slot at once."""
        group_id = request.group_id
        if parts.curriculum.is_held(group_id):
            return
        try:
            production = await producer.produce(request)
        except HoneError as error:
            reason = self._supervisor.group_failed(error)
            await self._drop([group_id], reason, str(error))
            return
        self._supervisor.group_made()
        self._statistics.add(production)
        summary = production.last
        self._books.note_scored(summary)
        pause_s = 0.0
        known = [reward for reward in production.plain.rewards if reward is not None]
        if known:
            self._supervisor.group_scored()
            is_idle = summary.is_uniform and self._config.tasks.skip_uniform
            parts.curriculum.observe(is_idle, sum(known) / len(known))
        else:
            pause_s = self._supervisor.group_unscored()
        is_known = summary.outcome == "duplicate" and await self._books.is_stored(group_id)
        if summary.outcome != "added" and not is_known:
            parts.curriculum.note_passes(production.plain.passes)
            try:
                await asyncio.sleep(pause_s)
            finally:  # also when the run ends meanwhile: no group is without its fate
                await self._drop([group_id], summary.outcome, "")
