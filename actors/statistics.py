"""Rollout and reward metrics of a step, from every group scored since the last one.

Invariant: means of rewards are over all plain trajectories, dropped groups included, so that
neither skipping uniform groups nor hints flatter the reward curve. Owned by the controller.
"""

import time
from math import fsum
from statistics import fmean, pstdev

import msgspec

from actors.producer import Production
from actors.reward_worker import GroupSummary
from cluster.reward_state import RUBRIC
from cluster.types import GUIDED


class RolloutStatistics:
    """Collects productions; `drain` turns them into metric keys of docs/reference.md."""

    def __init__(self) -> None:
        self._productions: list[Production] = []
        self._started = time.monotonic()

    def add(self, production: Production) -> None:
        self._productions.append(production)

    def drain(self) -> dict[str, float]:
        """Metrics since the last call; empty when nothing was scored."""
        productions, self._productions = self._productions, []
        sampled = [production.plain for production in productions]
        summaries = [_unguided(p.plain) if p.prefix_tokens else p.plain for p in productions]
        attempts = sampled + [s for p in productions for s in p.hinted.values()]
        now = time.monotonic()
        elapsed_s, self._started = max(1e-9, now - self._started), now
        if not summaries:
            return {}
        rewards = [reward for s in summaries for reward in s.rewards]
        known = [reward for reward in rewards if reward is not None]
        passed = [p for s in summaries for p in s.passed if p is not None]
        tokens = [count for s in attempts for count in s.completion_tokens]
        metrics = (
            {
                "reward/abstain_fraction": 1.0 - len(known) / len(rewards),
                "group/uniform_fraction": fmean(s.is_uniform for s in summaries),
                "rollout/tokens_per_s": sum(tokens) / elapsed_s,
                "rollout/completion_tokens_mean": fmean(tokens),
                "rollout/truncated_fraction": sum(s.num_truncated for s in attempts) / len(tokens),
                "reward/latency_max_s": max(s.max_latency_s for s in attempts),
            }
            | _guidance(productions)
            | _prefixes(productions)
        )
        if known:
            metrics |= {"reward/mean": fmean(known), "reward/std": pstdev(known)}
        for name, version in summaries[-1].reward_versions.items():
            number = version.partition("-")[0] if name == RUBRIC else str(int(version, 16))
            metrics[f"reward/version/{name}"] = float(number)
        if passed:
            metrics["reward/pass_rate"] = fmean(passed)
        return metrics | _signals(summaries, sampled) | _costs(attempts)


def _unguided(summary: GroupSummary) -> GroupSummary:
    """Without the rollouts that were given a beginning."""
    plain = [i for i, arm in enumerate(summary.arms) if arm != GUIDED]
    return msgspec.structs.replace(
        summary,
        rewards=[summary.rewards[i] for i in plain],
        passed=[summary.passed[i] for i in plain],
        signals={name: [scores[i] for i in plain] for name, scores in summary.signals.items()},
    )


def _signals(summaries: list[GroupSummary], sampled: list[GroupSummary]) -> dict[str, float]:
    """Of each verifier: mean score, shares of abstentions and, with guided rollouts, of those for
    lack of time, mean seconds for a group.
    """
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for s in summaries for name in s.signals):
        scores = [score for s in summaries for score in s.signals.get(name, [])]
        known = [score for score in scores if score is not None]
        metrics[f"reward/{name}/abstain_fraction"] = 1.0 - len(known) / len(scores)
        num_timed_out = sum(s.num_timed_out.get(name, 0) for s in summaries)
        num_verdicts = sum(len(s.signals.get(name, [])) for s in sampled)
        metrics[f"reward/{name}/timeout_fraction"] = num_timed_out / num_verdicts
        if known:
            metrics[f"reward/{name}/mean"] = fmean(known)
        if latencies := [s.latency_s[name] for s in summaries if name in s.latency_s]:
            metrics[f"reward/{name}/latency_s"] = fmean(latencies)
    return metrics


def _costs(attempts: list[GroupSummary]) -> dict[str, float]:
    """Of each verifier that pays for calls: the sum over the verdicts in the groups of attempts."""
    return {
        f"reward/{name}/cost": fsum(s.cost.get(name, 0.0) for s in attempts)
        for name in dict.fromkeys(name for s in attempts for name in s.cost)
    }


def _guidance(productions: list[Production]) -> dict[str, float]:
    """Shares of groups that no plain rollout solved, and of these that a hint solved, with the
    mean level of that hint; nothing in a run without hints.
    """
    if not any(p.can_be_guided for p in productions):
        return {}
    guided = [p for p in productions if p.hinted or p.num_hint_errors]
    solving = [max(p.hinted) for p in guided if any(p.last.passed)]
    num_errors = sum(p.num_hint_errors for p in guided)
    metrics = {"guide/guided_fraction": len(guided) / len(productions)}
    if guided:
        num_hints = num_errors + sum(len(p.hinted) for p in guided)
        metrics |= {
            "guide/solved_fraction": len(solving) / len(guided),
            "guide/hint_error_fraction": num_errors / num_hints,
        }
    if solving:
        metrics["guide/level_mean"] = fmean(solving)
    return metrics


def _prefixes(productions: list[Production]) -> dict[str, float]:
    """Tokens that prefixed rollouts were begun with, 0 where no solution had any or there was no
    room, and how many of these rollouts passed; nothing in a run without such.
    """
    asked = [p for p in productions if p.prefix_tokens]
    if not asked:
        return {}
    begun = [
        (passed, count)
        for p in asked
        for passed, count, arm in zip(
            p.plain.passed, p.plain.begun_tokens, p.plain.arms, strict=True
        )
        if arm == GUIDED
    ]
    metrics = {"guide/prefix_tokens": fmean(count for _, count in begun) if begun else 0.0}
    if known := [passed for passed, _ in begun if passed is not None]:
        metrics["guide/prefixed_pass_rate"] = fmean(known)
    return metrics
