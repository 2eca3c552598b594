"""PPO with a critic against GRPO on the quickstart: same warm start, same groups per step.

Invariant: both runs are whole `hone train` runs of this call. GRPO's pass@1 after `GRPO_STEPS` is
the mark; PPO, whose pre-training steps count, has twice as many steps to reach it.
"""

from pathlib import Path
from typing import NamedTuple

from benchmarks.proofs import run_timed
from benchmarks.show import Row, judged
from benchmarks.show_foundation import HONE, QUICKSTART
from cluster.run_dir import RunDir

GRPO_STEPS, FACTOR, EVAL_EVERY = 30, 2, 10
EXPLAINED, LAST_STEPS = 0.5, 10
TIMEOUT_S = 2400.0
PPO = [
    "objective.credit={use: gae, settings: {lambda_policy: 1.0}}",
    "critic={lr: 1.0e-3, pretrain_steps: 5}",
    "tasks.skip_uniform=false",
]


class Comparison(NamedTuple):
    """Held-out pass@1 by step of both, and PPO's explained variance, mean of its last steps."""

    grpo: dict[int, float]
    ppo: dict[int, float]
    explained_variance: float

    @property
    def mark(self) -> float:
        return self.grpo[GRPO_STEPS]

    @property
    def reached(self) -> int | None:
        """PPO's first evaluated step at or above the mark."""
        return next((step for step, value in self.ppo.items() if value >= self.mark), None)


def compare(seed: int, folder: Path) -> Comparison:
    """Both runs of one seed; raises `RuntimeError` with what a failed one said last."""
    grpo = _train(f"grpo-{seed}", seed, GRPO_STEPS, [], folder)
    ppo = _train(f"ppo-{seed}", seed, FACTOR * GRPO_STEPS, PPO, folder)
    name = "value/explained_variance"  # absent where all returns of a step are equal
    last = [row[name] for row in ppo[-LAST_STEPS:] if name in row]
    explained = sum(last) / len(last) if last else float("nan")
    return Comparison(_accuracies(grpo), _accuracies(ppo), explained)


def rows(quick: bool, folder: Path) -> list[Row]:
    """Two rows over all seeds; `quick` takes one seed and says so."""
    seeds = [0] if quick else [0, 1, 2]
    what = "seed 0 (reduced)" if quick else f"seeds {seeds[0]}-{seeds[-1]}"
    try:
        results = [compare(seed, folder) for seed in seeds]
    except RuntimeError as error:
        return [judged("PPO with a critic and GRPO on the quickstart", str(error), "0", False)]
    limit = FACTOR * GRPO_STEPS
    measured = "; ".join(
        f"GRPO {r.grpo[0]:.3f} to {r.mark:.3f} at step {GRPO_STEPS}, PPO "
        + (f"{r.ppo[r.reached]:.3f} at step {r.reached}" if r.reached is not None
           else f"{max(r.ppo.values()):.3f} at best")
        for r in results
    )  # fmt: skip
    explained = [r.explained_variance for r in results]
    return [
        judged(
            f"PPO with a critic reaches GRPO's held-out pass@1 on the quickstart, {what}",
            measured,
            f"within {limit} steps (2x)",
            all(r.reached is not None and r.reached <= limit for r in results),
        ),
        judged(
            f"explained variance of the critic on new rollouts, last {LAST_STEPS} steps, {what}",
            ", ".join(f"{value:.2f}" for value in explained),
            f"above {EXPLAINED}",
            all(value > EXPLAINED for value in explained),
        ),
    ]


def _train(
    name: str, seed: int, steps: int, overrides: list[str], folder: Path
) -> list[dict[str, float]]:
    arguments = [f"run.seed={seed}", f"run.steps={steps}", f"eval.every={EVAL_EVERY}", *overrides]
    run = run_timed(
        [str(HONE), "train", str(QUICKSTART), *arguments, "--run", name], folder, TIMEOUT_S
    )
    if run.code != 0:
        raise RuntimeError(f"{name}: exit code {run.code}: {run.output.strip()[-200:]}")
    return RunDir(folder / "runs" / name).read_metrics()


def _accuracies(metrics: list[dict[str, float]]) -> dict[int, float]:
    return {int(row["step"]): row["eval/pass@1"] for row in metrics if "eval/pass@1" in row}
