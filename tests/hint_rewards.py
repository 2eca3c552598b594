"""A verifier for tests of the program `guide`, importable by reward actors."""

from cluster.types import TrajectoryGroup, Verdict
from rewards.base import VerifierIO


class PassesAtLevel:
    """1 for every second rollout with a hint of `level`, 0 for the others and for plain ones."""

    def __init__(self, level: int) -> None:
        self._level = level

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        marks = [t.trajectory_id.rpartition("/")[2] for t in group.trajectories]
        return [
            Verdict(score=float(mark.startswith(f"hint{self._level}-") and mark[-1] in "02468"))
            for mark in marks
        ]
