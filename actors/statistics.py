"""Rollout and reward metrics of a step, from the summaries of every group scored since the last
one.

Invariant: means are over all scored trajectories, dropped groups included, so skipping uniform
groups does not flatter the reward curve. Owned by the controller.
"""

import time
from statistics import fmean, pstdev

from actors.reward_worker import GroupSummary
from cluster.reward_state import RUBRIC


class RolloutStatistics:
    """Collects summaries; `drain` turns them into metric keys of the contract."""

    def __init__(self) -> None:
        self._summaries: list[GroupSummary] = []
        self._started = time.monotonic()

    def add(self, summary: GroupSummary) -> None:
        self._summaries.append(summary)

    def drain(self) -> dict[str, float]:
        """Metrics since the last call; empty when nothing was scored."""
        summaries, self._summaries = self._summaries, []
        now = time.monotonic()
        elapsed_s, self._started = max(1e-9, now - self._started), now
        if not summaries:
            return {}
        rewards = [reward for s in summaries for reward in s.rewards]
        known = [reward for reward in rewards if reward is not None]
        passed = [p for s in summaries for p in s.passed if p is not None]
        tokens = [count for s in summaries for count in s.completion_tokens]
        metrics = {
            "reward/abstain_fraction": 1.0 - len(known) / len(rewards),
            "group/uniform_fraction": fmean(s.is_uniform for s in summaries),
            "rollout/tokens_per_s": sum(tokens) / elapsed_s,
            "rollout/completion_tokens_mean": fmean(tokens),
            "rollout/truncated_fraction": sum(s.num_truncated for s in summaries) / len(tokens),
            "reward/latency_max_s": max(s.max_latency_s for s in summaries),
        }
        if known:
            metrics |= {"reward/mean": fmean(known), "reward/std": pstdev(known)}
        for name, version in summaries[-1].reward_versions.items():
            number = version.partition("-")[0] if name == RUBRIC else str(int(version, 16))
            metrics[f"reward/version/{name}"] = float(number)
        if passed:
            metrics["reward/pass_rate"] = fmean(passed)
        for name in summaries[0].signals:
            scores = [x for s in summaries for x in s.signals.get(name, []) if x is not None]
            if scores:
                metrics[f"reward/{name}/mean"] = fmean(scores)
        return metrics
