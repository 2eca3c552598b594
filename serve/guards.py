"""When a policy version must go: error rate, latency and held-out evaluation, each with a window.

Invariant: a guard speaks only with enough evidence (`min_requests` in the window, two evals), and
names the measured figure and the bound. Pure: time comes from the caller.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec


class GuardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the automatic rollback. Latency is the median seconds per output token that
    requests waited for the engine.
    """

    window_s: float = 60.0
    min_requests: int = 20
    max_error_rate: float = 0.05
    max_latency_ratio: float = 3.0
    max_eval_drop: float = 0.1


class Outcome(msgspec.Struct, frozen=True):
    """One finished request. `is_error` counts failures of ours (5xx, a hang), not of the caller."""

    at: float
    is_error: bool
    token_s: float | None


class Outcomes:
    """What happened to the requests of each version within the window."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._recent: dict[int, deque[Outcome]] = {}

    def add(self, policy_version: int, outcome: Outcome) -> None:
        recent = self._recent.setdefault(policy_version, deque(maxlen=4096))
        recent.append(outcome)
        while recent and recent[0].at < outcome.at - self._settings.window_s:
            recent.popleft()

    def forget(self, keep: set[int]) -> None:
        for version in self._recent.keys() - keep:
            del self._recent[version]

    def complaint(self, suspect: int, reference: int | None, now: float) -> str:
        """Why `suspect` must go; empty while it may stay."""
        settings = self._settings
        recent = self._window(suspect, now)
        if len(recent) < settings.min_requests:
            return ""
        error_rate = sum(outcome.is_error for outcome in recent) / len(recent)
        if error_rate > settings.max_error_rate:
            return f"error rate {error_rate:.1%} above {settings.max_error_rate:.1%}"
        if reference is None or reference == suspect:
            return ""
        others = self._window(reference, now)
        mine, theirs = _median(recent), _median(others)
        if mine is None or theirs is None or len(others) < settings.min_requests:
            return ""
        if mine > theirs * settings.max_latency_ratio:
            ratio = mine / theirs
            return f"{ratio:.1f} times the latency a token, above {settings.max_latency_ratio:.1f}"
        return ""

    def _window(self, version: int, now: float) -> list[Outcome]:
        start = now - self._settings.window_s
        return [outcome for outcome in self._recent.get(version, ()) if outcome.at >= start]


@dataclass(frozen=True)
class EvalDrop:
    """The newest eval of what is served, against the best one before it."""

    blamed: int
    best: int
    reason: str  # empty while the drop is within the bound


def eval_drop(
    metrics: Sequence[Mapping[str, float]], served: int, settings: GuardSettings
) -> EvalDrop | None:
    """How the newest evaluated version up to `served` compares; None with fewer than two evals.

    `metrics` are rows of `metrics.jsonl`; an eval belongs to the row's `policy_version`.
    """
    evals = {
        int(row.get("policy_version", row["step"])): row["eval/pass@1"]
        for row in metrics
        if "eval/pass@1" in row and math.isfinite(row["eval/pass@1"])
    }
    blamed = max((version for version in evals if version <= served), default=None)
    earlier = [version for version in evals if blamed is not None and version < blamed]
    if blamed is None or not earlier:
        return None
    best = max(earlier, key=lambda version: (evals[version], version))
    drop, bound = evals[best] - evals[blamed], settings.max_eval_drop
    text = f"held-out pass@1 of {blamed} is {drop:.3f} below that of {best}, bound {bound:.3f}"
    return EvalDrop(blamed, best, text if drop > bound else "")


def standing(rows: Iterable[Mapping[str, float | None]]) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl` in the order they were written -> one a step, without those that a
    resumed run took back: a row of a step ends all rows of later steps.
    """
    steps: dict[float, dict[str, float]] = {}
    for row in rows:
        step = row.get("step")
        if step is None:
            continue
        while steps and next(reversed(steps)) > step:
            steps.popitem()
            if next(reversed(steps), None) == step:
                steps.popitem()
        known = {key: value for key, value in row.items() if value is not None}
        steps.setdefault(step, {}).update(known)
    return list(steps.values())


def _median(outcomes: Sequence[Outcome]) -> float | None:
    times = sorted(o.token_s for o in outcomes if o.token_s is not None)
    return times[len(times) // 2] if times else None
