"""PPO with a critic against GRPO on the quickstart: same warm start, same groups per step.

GRPO's pass@1 after `GRPO_STEPS` is the mark; PPO, whose pre-training steps count, has twice as many
steps to reach it. Both runs of a seed start from one warm start, and take groups that agree: a
critic needs them, and a method that leaves them out would see more tasks in as many steps.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks.show import Row, judged
from benchmarks.show_foundation import QUICKSTART
from benchmarks.study import main, train, training_tasks, warm_started

GRPO_STEPS, FACTOR, EVAL_EVERY = 30, 2, 10
EXPLAINED, PRETRAIN_STEPS = 0.5, 5
LEARNT = 0.1  # what GRPO must gain, or its mark would be no task for PPO
PASS = "eval/pass@1"
BOTH = ["tasks.skip_uniform=false"]
PPO = [
    "objective.credit={use: gae, settings: {lambda_policy: 1.0}}",
    f"critic={{lr: 1.0e-3, pretrain_steps: {PRETRAIN_STEPS}}}",
]


class Comparison(NamedTuple):
    """By step: held-out pass@1 of both, and the variance that PPO's critic explained, where returns
    were not all equal.
    """

    grpo: dict[float, float]
    ppo: dict[float, float]
    explained: dict[float, float]

    @property
    def mark(self) -> float:
        return self.grpo[GRPO_STEPS]

    @property
    def reached(self) -> float | None:
        """PPO's first evaluated step at or above the mark that is the last one, or is followed by
        another: one reading may be luck.
        """
        is_there = [value >= self.mark for value in self.ppo.values()]
        steps = zip(self.ppo, is_there, [*is_there[1:], True], strict=True)
        return next((step for step, now, after in steps if now and after), None)

    @property
    def explained_variance(self) -> float:
        """Mean from the end of pre-training until PPO reached the mark: past it, what is left of
        the variance of the returns is luck. NaN without such a step.
        """
        end = FACTOR * GRPO_STEPS if self.reached is None else self.reached
        known = [value for step, value in self.explained.items() if PRETRAIN_STEPS < step <= end]
        return fmean(known) if known else float("nan")


def compare(folder: Path, seed: int) -> Comparison:
    start = [
        *warm_started(QUICKSTART, folder / f"quickstart-{seed}", seed, training_tasks),
        *BOTH,
    ]
    length = [f"run.steps={GRPO_STEPS}", f"eval.every={GRPO_STEPS}"]
    grpo = train(QUICKSTART, folder, f"quickstart-grpo-{seed}", [*start, *length])
    length = [f"run.steps={FACTOR * GRPO_STEPS}", f"eval.every={EVAL_EVERY}"]
    ppo = train(QUICKSTART, folder, f"quickstart-ppo-{seed}", [*start, *length, *PPO])
    explained = ppo.curve("value/explained_variance")
    return Comparison(dict(grpo.curve(PASS)), dict(ppo.curve(PASS)), dict(explained))


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Two rows over all seeds; `quick` takes one seed and says so."""
    seeds = [0] if quick else [0, 1, 2]
    what = "seed 0 (reduced)" if quick else f"seeds {seeds[0]}-{seeds[-1]}"
    results = [compare(folder, seed) for seed in seeds]
    limit = FACTOR * GRPO_STEPS
    measured = "; ".join(
        f"GRPO {r.grpo[0]:.3f} to {r.mark:.3f} at step {GRPO_STEPS}, PPO "
        + (f"{r.ppo[r.reached]:.3f} at step {r.reached:.0f}" if r.reached is not None
           else f"{max(r.ppo.values()):.3f} at best")
        for r in results
    )  # fmt: skip
    explained = [r.explained_variance for r in results]
    yield judged(
        f"PPO with a critic reaches GRPO's held-out pass@1 on the quickstart, {what}",
        measured,
        f"within {limit} steps (2x), in two readings or the last, GRPO's gain at least {LEARNT}",
        all(r.reached is not None and r.mark - r.grpo[0] >= LEARNT for r in results),
    )
    yield judged(
        f"explained variance of the critic on new rollouts, until the mark, {what}",
        ", ".join(f"{value:.2f}" for value in explained),
        f"above {EXPLAINED}",
        all(value > EXPLAINED for value in explained),
    )


if __name__ == "__main__":
    main(rows)
