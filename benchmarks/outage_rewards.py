"""The rule before the judge of `benchmarks.judge_outage`: it decides bare answers only.

Invariant: a completion of several lines abstains here, and so needs the judge; one line, or none
with a word in it, is decided.
"""

import re

from cluster.types import TrajectoryGroup, Verdict
from rewards.answers import after_thinking
from rewards.base import VerifierIO

_WORD = re.compile(r"\w")


class BareAnswer:
    """1 for a completion that is the reference and nothing else, 0 for another single line."""

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        gold = group.task.reference
        return [_verdict(after_thinking(t.text), gold) for t in group.trajectories]


def _verdict(text: str, gold: str) -> Verdict:
    if sum(bool(_WORD.search(line)) for line in text.splitlines()) > 1:
        return Verdict(score=None, error="worked out: whether that is sound is for the judge")
    return Verdict(score=float(text.strip() == gold))
