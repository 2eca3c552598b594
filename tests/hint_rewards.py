"""A verifier and a program for tests of hints, importable by actors."""

from actors.guide import Guide
from actors.prefix import SolutionPrefix
from actors.rollout import RolloutIO, RolloutRequest
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


class RejectsAfter(Guide):
    """`guide` that rejects every completion after a hint with `word`, and no other one; a request
    with prefix tokens is one of `prefix`.
    """

    def __init__(self, word: str) -> None:
        super().__init__(reject="")
        self._word = word
        self._strict = Guide(reject=r"\A")

    async def run(self, request: RolloutRequest, io: RolloutIO) -> TrajectoryGroup:
        if request.prefix_tokens:
            return await SolutionPrefix(tokens=1).run(request, io)
        level = request.hint_level
        if level and self._word in request.task.hints[level - 1]:
            return await self._strict.run(request, io)
        return await super().run(request, io)
