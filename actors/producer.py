"""From a request to a settled group: rollouts, rewards, and hinted tries of what all rollouts fail.

Invariant: of all attempts at a group at most one is in the buffer, scored as a whole by one reward
version; statistics of rewards see the plain attempt only, so hints never flatter the reward curve.
Used by the controller; `actors.guide` tells why attempts are made here.
"""

import logging
import random
from dataclasses import dataclass, field, replace

from actors.fleet import MAX_TRIES, RolloutFleet
from actors.programs import PROGRAMS
from actors.reward_pool import RewardPool
from actors.reward_worker import UNSOLVED, GroupSummary
from actors.rollout import Guiding, RolloutRequest
from actors.stages import Stages
from cluster import plugins, traces
from cluster.config import Plugin
from cluster.errors import HintError, InputLostError

log = logging.getLogger(__name__)


@dataclass
class Production:
    """What became of a group: its plain attempt, and the hinted ones by level."""

    plain: GroupSummary
    hinted: dict[int, GroupSummary] = field(default_factory=dict[int, GroupSummary])
    num_hint_errors: int = 0
    can_be_guided: bool = False
    prefix_tokens: int = 0  # that some of the rollouts were asked to begin with

    @property
    def last(self) -> GroupSummary:
        """The attempt that counts."""
        return list(self.hinted.values())[-1] if self.hinted else self.plain


class Producer:
    """Runs the attempts at one group after another."""

    def __init__(
        self, program: Plugin, fleet: RolloutFleet, rewards: RewardPool, stages: Stages
    ) -> None:
        built = plugins.build(program.use, program.settings, PROGRAMS, "rollout.program")
        self._guiding = built if isinstance(built, Guiding) else None
        self._fleet = fleet
        self._rewards = rewards
        self._stages = stages

    async def produce(self, request: RolloutRequest) -> Production:
        """One group from task to buffer, or dropped for the reason in `last.outcome`. Rollouts that
        are lost with their node before they are scored are made again.
        """
        traces.begin(request.group_id)
        for _ in range(MAX_TRIES - 1):
            try:
                return await self._attempt(request)
            except InputLostError as error:
                log.warning("group %s is made again: %s", request.group_id, error)
        return await self._attempt(request)

    async def _attempt(self, request: RolloutRequest) -> Production:
        guiding = self._guiding
        num_levels = 0 if guiding is None else guiding.num_levels(request.task)
        with self._stages.busy("rollout"):
            plain = await self._fleet.rollout(request)
        with self._stages.busy("score"):
            summary = await self._rewards.score_and_add(plain, must_solve=num_levels > 0)
        production = Production(
            summary, can_be_guided=num_levels > 0, prefix_tokens=request.prefix_tokens
        )
        if guiding is None:
            return production
        for level in range(1, num_levels + 1):
            if production.last.outcome != UNSOLVED:
                break
            try:
                with self._stages.busy("rollout"):
                    hinted = await self._fleet.rollout(_hinted(request, level))
            except HintError as error:
                log.warning("task %s, hint %d: %s", request.task.task_id, level, error)
                production.num_hint_errors += 1
                continue
            with self._stages.busy("score"):
                production.hinted[level] = await self._rewards.score_and_add(
                    hinted,
                    must_solve=True,
                    failed=plain if guiding.merge == "fill_wrong" else None,
                )
        return production


def _hinted(request: RolloutRequest, level: int) -> RolloutRequest:
    """The same group at another level, with a seed of its own."""
    seed = request.sampling.seed
    if seed is not None:
        seed = random.Random(f"{seed}/{level}").getrandbits(31)
    return replace(request, hint_level=level, sampling=replace(request.sampling, seed=seed))
