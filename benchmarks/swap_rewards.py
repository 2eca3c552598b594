"""Verifiers for `benchmarks.live_swaps`: a reward tells which version gave it, and some die.

Invariant: the reward of a trajectory is `is_right` plus the version's own bonus, so a reward from
another version than its label is seen.
"""

import os
from pathlib import Path

from cluster.types import TrajectoryGroup, Verdict
from rewards.base import VerifierIO


def is_right(completion: str, reference: str) -> bool:
    return completion.strip().rpartition("\n")[2].strip() == reference


class Bonus:
    """1 for the right last line and 0 for another one, plus `bonus`."""

    def __init__(self, bonus: float = 0.0) -> None:
        self._bonus = bonus

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        gold = group.task.reference
        return [Verdict(score=is_right(t.text, gold) + self._bonus) for t in group.trajectories]


class DiesBuilt(Bonus):
    """Dies before it can be checked."""

    def __init__(self, bonus: float = 0.0) -> None:
        super().__init__(bonus)
        os._exit(9)


class DiesOnGold(Bonus):
    """Dies when it is checked."""

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        os._exit(9)


class DiesInWorkers(Bonus):
    """Sound as a candidate; the second process that builds it dies. `mark` is a file to make."""

    def __init__(self, mark: str, bonus: float = 0.0) -> None:
        super().__init__(bonus)
        if Path(mark).exists():
            os._exit(9)
        Path(mark).touch()


class DiesLive(Bonus):
    """Passes its checks and dies on groups of the run."""

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        if not group.group_id.startswith("check-"):
            os._exit(9)
        return await super().score(group, io)
