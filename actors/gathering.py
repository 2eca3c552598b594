"""From the buffer into the learner: the groups of one step, claimed until there are enough.

Invariant: a step takes in `rollout.groups_per_step` groups, none of them twice and none that the
buffer does not hold; a group that is too old or cannot be read is dropped with that reason and the
step gets another, unless that happens to more than a step of them. Owned by the controller.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from actors.bookkeeping import DEAD_LETTER, TOO_OLD, Bookkeeping
from actors.curriculum import Curriculum
from actors.intake import BATCHES_PER_STEP, InDrawOrder, Intake, WithinAge
from actors.stages import Stages
from cluster.config import Config
from cluster.errors import BufferUnavailableError, GroupsVanishedError, StageError, WireError
from cluster.redis_client import OUTAGE_S
from cluster.replay_policy import Fifo, policy_of
from cluster.replay_records import DeadLetter
from cluster.types import GroupHeader
from learners.group import LearnerGroup

CLAIM_WAIT_S = 0.5
LOOK_S = 15.0  # without a group, until it is asked whether any has vanished; twice, to be sure
MAX_UNREADABLE = 16  # more than a step's groups, of one step
Drop = Callable[[list[str], str, str], Awaitable[None]]


class Gathering:
    """`drop(group_ids, reason, detail)` is told of groups that the step cannot use; `producing()`
    are those on their way to the buffer.
    """

    def __init__(
        self,
        config: Config,
        books: Bookkeeping,
        stages: Stages,
        stopping: asyncio.Event,
        drop: Drop,
        producing: Callable[[], set[str]],
    ) -> None:
        self._num_groups = config.rollout.groups_per_step
        self._max_policy_age = config.rollout.max_policy_age
        is_alternating = config.resources.layout == "alternating"  # engines finish first
        self._num_batches = 1 if is_alternating else BATCHES_PER_STEP
        self._is_fifo = isinstance(policy_of(config), Fifo)
        self._left_over: list[GroupHeader] = []
        self._num_unreadable = 0  # of the present step
        self._books = books
        self._stages = stages
        self._stopping = stopping
        self._drop = drop
        self._producing = producing
        self._looked_at = 0.0
        self._missing: set[str] = set()  # when it was looked at

    async def step(self, learner: LearnerGroup, curriculum: Curriculum) -> list[GroupHeader]:
        """Claim and take in the groups of one step; when the run is stopping, those claimed so
        far.
        """
        self._num_unreadable = 0
        self._see_groups()
        intake = self._intake(curriculum)
        await self._discard(intake, intake.strays)
        batches = intake.offer([])
        num_taken = 0
        while True:
            for batch in batches:
                num_taken += await self._take_in(learner, intake, batch)
            await self._discard(intake, intake.strays)
            if num_taken >= self._num_groups:
                await self._leave(intake.waiting)
                return intake.claimed
            if self._stopping.is_set():
                return _held(intake)
            await learner.rest()
            num_left = self._num_groups - num_taken
            batches = await self._next(num_left, learner, intake, curriculum)

    async def _discard(self, intake: Intake, strays: list[str]) -> None:
        """Groups that were dropped before they came, as when a reward worker was given up after it
        had added one: said to be dropped, they must not move the weights.
        """
        intake.forget(strays)
        await self._books.discard(strays)

    async def _leave(self, headers: list[GroupHeader]) -> None:
        """Claimed, but without a seat in this step. First come, they are the first of the next one,
        unless they will be too old for it, as all are in `sync` mode. Otherwise they go back, and
        the next claim drops them or chooses among all that are ready by then.
        """
        due = self._books.policy_version - self._max_policy_age
        self._left_over = [h for h in headers if self._is_fifo and h.min_policy_version > due]
        kept = {header.group_id for header in self._left_over}
        if back := [header for header in headers if header.group_id not in kept]:
            await self._books.release(back)

    async def _next(
        self, num_groups: int, learner: LearnerGroup, intake: Intake, curriculum: Curriculum
    ) -> list[list[GroupHeader]]:
        """The batches to take in next, when up to `num_groups` have been claimed or a drop has let
        some go that were. One wait, however long: the watchdog goes by it. It ends without any when
        what came must wait, and when the run is stopping. A learner that is lost is missed at once.
        """
        with self._stages.wait("learn", "scored groups"):
            while True:
                claim = await self._books.claim(num_groups, CLAIM_WAIT_S, _held(intake))
                await self._drop(claim.too_old, TOO_OLD, "")
                await self._bury(claim.dead, intake)
                come = [h.group_id for h in claim.headers]
                strays = [group_id for group_id in come if not curriculum.is_expected(group_id)]
                await self._discard(intake, [*intake.strays, *strays])
                batches = intake.offer([h for h in claim.headers if h.group_id not in strays])
                has_come = come or claim.too_old or claim.dead
                if batches or has_come or self._stopping.is_set():
                    self._see_groups()
                    return batches
                await learner.check()
                await self._look_for_vanished(curriculum)

    def _see_groups(self) -> None:
        self._looked_at, self._missing = time.monotonic(), set()

    async def _look_for_vanished(self, curriculum: Curriculum) -> None:
        """Raise `GroupsVanishedError` for groups that nobody has: a Redis that came back without
        its last second has replied to adds that it no longer knows, or still has groups with steps
        that a roll-back has undone, and no step would end.
        """
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        unsettled = curriculum.unsettled - self._producing()
        places = await self._books.places()
        missing = unsettled - {g for g, place in places.items() if place != "consumed"}
        if gone := sorted(missing & self._missing & curriculum.unsettled):
            raise GroupsVanishedError(
                "learn", f"Redis has lost {len(gone)} groups, the first of them {gone[0]}"
            )
        self._looked_at, self._missing = time.monotonic(), missing

    def forget(self) -> None:
        """The run goes back to its last durable state: nothing is left over from a step."""
        self._left_over = []

    def _intake(self, curriculum: Curriculum) -> Intake:
        if self._max_policy_age == 0:
            return InDrawOrder(curriculum, self._num_groups, self._num_batches)
        due = self._books.policy_version - self._max_policy_age
        return WithinAge(curriculum, self._num_groups, due, self._left_over)

    async def _take_in(
        self, learner: LearnerGroup, intake: Intake, batch: list[GroupHeader]
    ) -> int:
        """Gradients of a batch; returns of how many groups. What cannot be read is left out: the
        buffer has put it to the dead letters.
        """
        started = time.monotonic()
        while batch:
            try:
                await learner.forward_backward(batch)
                break
            except BufferUnavailableError:  # no gradient was added: once more when Redis is back
                if time.monotonic() - started > OUTAGE_S:
                    raise
                await asyncio.sleep(CLAIM_WAIT_S)
                await self._books.depth()
            except WireError as error:
                claim = await self._books.claim(0, 0.0, _held(intake))
                lost = await self._bury(claim.dead, intake)
                if not lost & {header.group_id for header in batch}:
                    raise GroupsVanishedError("learn", str(error)) from error
                batch = [header for header in batch if header.group_id not in lost]
        return len(batch)

    async def _bury(self, letters: list[DeadLetter], intake: Intake) -> set[str]:
        """Groups that turned out to be poison; returns their ids. Raises `StageError` when they are
        no accident.
        """
        for letter in letters:
            intake.forget([letter.group_id])
            await self._drop([letter.group_id], DEAD_LETTER, letter.reason)
            self._num_unreadable += 1
            if self._num_unreadable > self._num_groups + MAX_UNREADABLE:
                raise StageError(
                    "learn",
                    f"{self._num_unreadable} groups of one step went to the dead letters (`hone "
                    f"replay show`), the last one for: {letter.reason}",
                )
        return {letter.group_id for letter in letters}


def _held(intake: Intake) -> list[GroupHeader]:
    return [*intake.claimed, *intake.waiting]
