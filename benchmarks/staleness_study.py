"""What old rollouts cost: naive, decoupled and truncated importance sampling at a policy age of 8.

The policy must move from the way it mostly takes to the one it takes least, so that old rollouts
are far from the policy they train. `rollout.max_policy_age` k lets rollouts run k steps ahead: the
slots are always full, so groups are k versions old when they are consumed, as long as the engine
is faster than the learner: small micro-batches see to that, and a study with young groups shows
nothing. All runs of a seed start from one warm-started policy.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.entropy_study import CONFIG, start
from benchmarks.show import Row, judged
from benchmarks.study import Run, main, train

WAY = "d"  # the rarest in the warm start
STEPS, LAST_STEPS = 60, 10
OLDEST, LEAST_AGE, AGED_STEPS = 8, 6.0, 40  # the mean age of the last steps, once slots are full
WITHIN = 0.1  # of the on-policy run's final reward
RARE_WAY = [
    f"tasks.train.settings={{size: 20000, seed: 1, way: {WAY}}}",
    f"tasks.eval.settings={{size: 240, seed: 1000000, way: {WAY}}}",
]
TASK = [
    *RARE_WAY,
    f"run.steps={STEPS}",
    f"eval.every={STEPS}",
    "learner.minibatches=4",
    "learner.microbatch_tokens=48",  # three trajectories: slower than the engine
]


@dataclass(frozen=True)
class Method:
    max_policy_age: int
    settings: dict[str, Any]

    @property
    def changes(self) -> list[str]:
        losses = {"policy": {"use": "policy_gradient", "settings": self.settings}}
        return [
            *TASK,
            f"rollout.max_policy_age={self.max_policy_age}",
            f"objective.losses={json.dumps(losses)}",
        ]


def _decoupled(**correction: Any) -> dict[str, Any]:
    return {"ratio_to": "proximal", "correction": {"level": "token", **correction}}


METHODS = {
    "on-policy": Method(0, {"ratio_to": "rollout"}),
    "naive": Method(OLDEST, {"ratio_to": "rollout"}),
    "decoupled": Method(OLDEST, _decoupled(action="mask", high=5.0)),
    "TIS": Method(OLDEST, _decoupled(action="truncate", high=2.0)),
}
Results = dict[str, list[Run]]


def measure(folder: Path, seeds: Sequence[int]) -> Results:
    results: Results = {method: [] for method in METHODS}
    for seed in seeds:
        changes = start(folder, seed)
        for name, method in METHODS.items():
            run = train(CONFIG, folder, f"{name}-{seed}", [*changes, *method.changes])
            results[name].append(run)
    return results


def mean(runs: Sequence[Run], key: str, num_steps: int = LAST_STEPS) -> float:
    return fmean(run.last(key, num_steps) for run in runs)


def oldest(runs: Sequence[Run]) -> float:
    return max(age for run in runs for _, age in run.curve("policy_age/max"))


def table(results: Results) -> Table:
    """Means over the seeds; ages and mismatch over the whole run, rewards over its last steps."""
    rows = Table(
        "method", "policy age", "final reward", "held-out pass@1", "mismatch KL", "clipped"
    )
    for name, runs in results.items():
        rows.add_row(
            name,
            f"mean {mean(runs, 'policy_age/mean', STEPS):.1f}, oldest {oldest(runs):.0f}",
            f"{mean(runs, 'reward/mean'):.3f}",
            f"{mean(runs, 'eval/pass@1', 1):.3f}",
            f"{mean(runs, 'ratio/mismatch_kl', STEPS):.1e}",
            f"{mean(runs, 'ratio/clip_fraction', STEPS):.3f}",
        )
    return rows


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """One seed with QUICK, else three."""
    results = measure(folder, range(1 if quick else 3))
    Console().print(table(results))
    old = [results[name] for name, method in METHODS.items() if method.max_policy_age]
    age = min(run.last("policy_age/mean", AGED_STEPS) for runs in old for run in runs)
    measured = "; ".join(
        f"{name}: reward {mean(runs, 'reward/mean'):.2f}, "
        f"KL {mean(runs, 'ratio/mismatch_kl', STEPS):.1e}, "
        f"age {mean(runs, 'policy_age/mean', AGED_STEPS):.1f}, at most {oldest(runs):.0f}"
        for name, runs in results.items()
    )
    reward = {name: mean(runs, "reward/mean") for name, runs in results.items()}
    corrected = min(reward["decoupled"], reward["TIS"])
    yield judged(
        f"policy age up to {OLDEST}: naive, decoupled, TIS; {len(results['TIS'])} seed(s)",
        measured,
        f"mean age of the last {AGED_STEPS} steps at least {LEAST_AGE:g} in every run, {OLDEST} "
        f"seen in each method; corrected runs within {WITHIN} of on-policy, and above naive",
        age >= LEAST_AGE
        and min(map(oldest, old)) == OLDEST
        and corrected >= reward["on-policy"] - WITHIN
        and corrected > reward["naive"],
    )


if __name__ == "__main__":
    main(rows)
