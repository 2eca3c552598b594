"""What scored samples say of a policy: pass@1, pass@k and maj@k, each with its uncertainty.

Invariant: an abstained sample is in no numerator and no denominator. Samples of one task are not
independent, so the task is the unit of the standard error (clustered, arXiv 2411.00640).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks in [0, 1] and the half width of its 95 % interval (NaN below two tasks)."""

    value: float
    half_width: float

    @classmethod
    def over_tasks(cls, values: Sequence[float]) -> "Estimate":
        """Example: values 1, 1, 0, 0 are 0.5 with a half width of 1.96 * 0.577 / 2 = 0.566."""
        if not values:
            return cls(math.nan, math.nan)
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(fmean(values), CONFIDENCE_95 * error)


@dataclass(frozen=True)
class TaskSamples:
    """The scored samples of one task: whether each passed, and the answer it gave."""

    passed: list[bool]
    answers: list[str]


def pass_at_k(samples: TaskSamples, k: int) -> float:
    """Unbiased chance that one of `k` samples passes: 1 - C(n - c, k) / C(n, k) for c passes among
    n >= k (arXiv 2107.03374). Example: 1 pass among 4, k = 2: 0.5.
    """
    n, c = len(samples.passed), sum(samples.passed)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(samples: TaskSamples) -> float:
    """Whether the most frequent answer passes; equally frequent ones share the verdict evenly."""
    votes = Counter(samples.answers)
    top = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == top]
    by_answer = {
        winner: [p for p, a in zip(samples.passed, samples.answers, strict=True) if a == winner]
        for winner in winners
    }
    return fmean(fmean(passed) for passed in by_answer.values())
