"""PPO with a critic against GRPO: same warm start, same groups per step.

GRPO's pass@1 after `grpo_steps` is the mark; PPO, whose pre-training steps count, has twice as many
steps to reach it. Both runs of a seed start from one warm start, and take groups that agree: a
critic needs them, and a method that leaves them out would see more tasks in as many steps.

There are two tasks. On the quickstart most tokens are in worked sums, of which hardly anything says
beforehand whether there will be a slip: beside the variance that the critic explains stands what
one would that knows every slip once its line is written. On riddles one token, the way that is
taken, decides what the rest will earn, so a critic that explains little of that has not learned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks import entropy_study, staleness_study
from benchmarks.foreseeable import explained_by_slips
from benchmarks.show import Row, judged
from benchmarks.show_foundation import QUICKSTART
from benchmarks.study import main, train, training_tasks, warm_started
from cluster.run_dir import RunDir

FACTOR, EVAL_EVERY = 2, 10
EXPLAINED = 0.5
SAMPLES = "run.samples_per_step=32"  # all of two groups, which a step keeps
LEARNT = 0.1  # what GRPO must gain, or its mark would be no task for PPO
PASS = "eval/pass@1"
CREDIT = "objective.credit={use: gae, settings: {lambda_policy: 1.0}}"


@dataclass(frozen=True)
class Case:
    name: str
    config: Path
    task: list[str]  # changes to `config`
    grpo_steps: int
    pretrain_steps: int
    is_worked: bool  # step by step, so that a slip can be seen

    @property
    def ppo(self) -> list[str]:
        return [CREDIT, f"critic={{lr: 1.0e-3, pretrain_steps: {self.pretrain_steps}}}"]


CASES = (
    Case("quickstart", QUICKSTART, ["tasks.skip_uniform=false"], 30, 5, is_worked=True),
    Case("riddles", entropy_study.CONFIG, staleness_study.RARE_WAY, 40, 10, is_worked=False),
)


class Comparison(NamedTuple):
    """By step: held-out pass@1 of both, and the variance that PPO's critic explained, where returns
    were not all equal; `foreseeable` of GRPO's rollouts, where slips can be seen.
    """

    case: Case
    grpo: dict[float, float]
    ppo: dict[float, float]
    explained: dict[float, float]
    foreseeable: float | None

    @property
    def mark(self) -> float:
        return self.grpo[self.case.grpo_steps]

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
        first = self.case.pretrain_steps
        end = FACTOR * self.case.grpo_steps if self.reached is None else self.reached
        known = [value for step, value in self.explained.items() if first < step <= end]
        return fmean(known) if known else float("nan")


def compare(case: Case, folder: Path, seed: int) -> Comparison:
    name, steps = case.name, case.grpo_steps
    start = [
        *warm_started(case.config, folder / f"{name}-{seed}", seed, training_tasks),
        *case.task,
    ]
    length = [f"run.steps={steps}", f"eval.every={steps}"]
    if case.is_worked:
        length.append(SAMPLES)
    grpo = train(case.config, folder, f"{name}-grpo-{seed}", [*start, *length])
    samples = RunDir(folder / f"{name}-grpo-{seed}").read_samples()
    foreseeable = explained_by_slips(samples) if case.is_worked else None
    length = [f"run.steps={FACTOR * steps}", f"eval.every={EVAL_EVERY}"]
    ppo = train(case.config, folder, f"{name}-ppo-{seed}", [*start, *length, *case.ppo])
    explained = ppo.curve("value/explained_variance")
    accuracies = dict(grpo.curve(PASS)), dict(ppo.curve(PASS))
    return Comparison(case, *accuracies, dict(explained), foreseeable)


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Two rows per task over all seeds; `quick` takes one seed and says so."""
    seeds = [0] if quick else [0, 1, 2]
    what = "seed 0 (reduced)" if quick else f"seeds {seeds[0]}-{seeds[-1]}"
    for case in CASES:
        results = [compare(case, folder, seed) for seed in seeds]
        yield from judge(case, results, what)


def judge(case: Case, results: list[Comparison], what: str) -> Iterator[Row]:
    measured = "; ".join(
        f"GRPO {r.grpo[0]:.3f} to {r.mark:.3f} at step {case.grpo_steps}, PPO "
        + (f"{r.ppo[r.reached]:.3f} at step {r.reached:.0f}" if r.reached is not None
           else f"{max(r.ppo.values()):.3f} at best")
        for r in results
    )  # fmt: skip
    yield judged(
        f"PPO with a critic reaches GRPO's held-out pass@1, {case.name}, {what}",
        measured,
        f"within {FACTOR * case.grpo_steps} steps ({FACTOR}x), in two readings or the last, "
        f"GRPO's gain at least {LEARNT}",
        all(r.reached is not None and r.mark - r.grpo[0] >= LEARNT for r in results),
    )
    explained = [r.explained_variance for r in results]
    yield judged(
        f"explained variance of the critic on new rollouts, until the mark, {case.name}, {what}",
        ", ".join(f"{value:.2f}" for value in explained) + _foreseen(results),
        f"above {EXPLAINED}",
        all(value > EXPLAINED for value in explained),
    )


def _foreseen(results: list[Comparison]) -> str:
    known = [f"{r.foreseeable:.2f}" for r in results if r.foreseeable is not None]
    return f" (one that knows each slip a line later: {', '.join(known)})" if known else ""


if __name__ == "__main__":
    main(rows)
