"""The verifier protocol: what scores a group, and what it may use while it does.

Invariant: a verifier answers with one `Verdict` per trajectory, in order; what it could not check
has `score=None`. By convention 1 is the best score, so the gold answer earns 1 from every rewarded
signal. Implemented by the modules of this package and by users' plug-ins; called by
`rewards.rubric` only.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from cluster.errors import DeadlineError, HoneError
from cluster.types import TrajectoryGroup, Verdict

TIMED_OUT = "timed_out"  # in the breakdown of an abstention because time ran out
COST = "cost"  # in the breakdown of a verdict: what its calls cost


def abstention(error: HoneError, words: str = "") -> Verdict:
    """The check could not be made; `words` come before the error's own."""
    breakdown = {TIMED_OUT: 1.0} if isinstance(error, DeadlineError) else {}
    return Verdict(score=None, error=f"{words}{error}", breakdown=breakdown)


class VerifierIO(Protocol):
    """What the rubric lends to a verifier for one group."""

    timeout_s: float  # for the whole group, not counting the start of worker processes
    policy_dir: str  # the policy's tokenizer is there; "" where no policy is known

    @property
    def left_s(self) -> float:
        """What is left of `timeout_s`."""
        ...

    async def run_isolated(
        self, function: str, *args: object, timeout_s: float | None = None
    ) -> object:
        """Run `"module:function"` with plain data in a worker process that is killed when it hangs.

        Arguments and result are what msgpack carries (str, numbers, bool, None, lists, dicts). One
        call may run `timeout_s` seconds (default: half of the group's). Raises `CheckTimeout` or
        `CheckCrashed` of `rewards.isolation`.
        """
        ...


class Verifier(Protocol):
    """Scores whole groups, so that it can compare siblings. It must not block the event loop.

    Example, a verifier that pays for the word "because":

        class Because:
            async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
                return [Verdict(score=float("because" in t.text)) for t in group.trajectories]
    """

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        """One verdict per trajectory, in order; `name`, version and latency are stamped later."""
        ...


@runtime_checkable
class HasExample(Protocol):
    """A verifier that shows what a well-formed completion looks like, for the self-checks."""

    example: str  # "{answer}" stands for the gold answer; "" for no particular form


@runtime_checkable
class HasGoldScore(Protocol):
    """A verifier that gives a gold answer less than 1, such as a probability."""

    gold_score: float  # the least that a gold answer must earn for the verifier to go live


class GoldenPair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A completion whose score is known; a verifier that scores it otherwise never goes live.

    It stands for a task with this `reference` (or these `tests`, for code).
    """

    completion: str
    score: float
    reference: str = ""
    tests: Any = None


@runtime_checkable
class HasGolden(Protocol):
    """A verifier that brings completions whose scores it must get right before it goes live."""

    golden: Sequence[GoldenPair]
