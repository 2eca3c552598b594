"""The simulator against real runs, and what it says from 8 to 10,000 GPUs.

Validation makes three runs that differ in `rollout.max_policy_age` alone (0, 1, 3), reads the stage
times each left behind, and compares the simulated with the measured step: each from its own stage
times, then those that run ahead from the stage times of the sync run. `benchmarks.throughput` does
so with its runs of long-tailed lengths. Run with
`python -m benchmarks.simulation validate FOLDER` (made there, or taken from there),
`... compare RUN_DIR ...` (finished ones) or `... scale PROFILE`.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.proofs import ROOT
from benchmarks.show import Row, judged
from benchmarks.study import train
from cluster.run_dir import RunDir
from cluster.simulation import Forecast, Layout, simulate
from cluster.stage_profile import StageProfile
from serve import scaling

CONFIG = ROOT / "deploy" / "configs" / "quickstart.yaml"
PROFILE = ROOT / "deploy" / "profiles" / "quickstart_two_cores.json"
AGES = (0, 1, 3)
STEPS, QUICK_STEPS = 40, 20
WITHIN = 0.15
NEAR_UNIFORM = "short lengths that differ little"
SIZES = (8, 64, 512, 10_000)
QUICK_SIZES = (8, 64)
TAIL = (128.0, 1.0, 1024)  # log-normal: mean, sigma, cap


@dataclass(frozen=True)
class Comparison:
    """One run, its measured step and a simulated one."""

    measured: StageProfile
    simulated: Forecast

    @property
    def error(self) -> float:
        """Simulated over measured seconds of a step, less 1."""
        assert self.measured.measured_step_s is not None
        return self.simulated.step_s / self.measured.measured_step_s - 1.0

    def __str__(self) -> str:
        run, forecast = self.measured, self.simulated
        return (
            f"age {run.max_policy_age}: {run.measured_step_s:.2f} s measured, "
            f"{forecast.step_s:.2f} simulated ({self.error:+.0%}); "
            f"learner idle {run.measured_learner_idle:.0%} and {forecast.learner_idle:.0%}, "
            f"mean age {run.measured_age:.1f} and {forecast.age_mean:.1f}"
        )


def compare(times: StageProfile, run: StageProfile) -> Comparison:
    """The layout of `run` with the stage times of `times`."""
    layout = Layout(
        workers=run.workers,
        world_size=run.world_size,
        max_policy_age=run.max_policy_age,
        groups_per_step=run.groups_per_step,
    )
    return Comparison(run, simulate(times, layout, steps=100))


def make_runs(folder: Path, num_steps: int) -> list[RunDir]:
    """The quickstart after a short warm start, every group kept, no evaluation on the way."""
    changes = [
        f"run.steps={num_steps}", f"run.checkpoint_every={num_steps}", f"eval.every={num_steps}",
        "eval.tasks=8", "warm_start.steps=100", "tasks.skip_uniform=false",
    ]  # fmt: skip
    for age in AGES:
        train(CONFIG, folder, f"age-{age}", [*changes, f"rollout.max_policy_age={age}"])
    return [RunDir(folder / f"age-{age}") for age in AGES]


def validated(runs: Sequence[StageProfile], lengths: str) -> Iterator[Row]:
    """Runs in `sync` mode first; `lengths` says what kind of completions they sampled."""
    own = [compare(run, run) for run in runs]
    yield judged(
        f"the simulated step of a run, from its own stage times, {lengths}",
        "; ".join(map(str, own)),
        f"within {WITHIN:.0%}",
        all(abs(c.error) <= WITHIN for c in own),
    )
    sync = next((run for run in runs if run.max_policy_age == 0), None)
    ahead = [compare(sync, run) for run in runs if sync and _differs_in_age(sync, run)]
    if ahead:
        yield judged(
            f"the simulated step of runs ahead, from the stage times of the sync run, {lengths}",
            "; ".join(map(str, ahead)),
            f"within {WITHIN:.0%}",
            all(abs(c.error) <= WITHIN for c in ahead),
        )


def _differs_in_age(sync: StageProfile, run: StageProfile) -> bool:
    shapes = [(p.workers, p.world_size, p.groups_per_step, len(p.lengths[0])) for p in (sync, run)]
    return shapes[0] == shapes[1] and run.max_policy_age > 0


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    num_steps = QUICK_STEPS if quick else STEPS
    runs = [StageProfile.of_run(run) for run in make_runs(folder, num_steps)]
    yield from validated(runs, NEAR_UNIFORM)


def at_sizes(profile: StageProfile, sizes: Sequence[int]) -> Iterator[Forecast]:
    """Half of the GPUs for each side, a group a GPU and step, a long tail, in the three modes."""
    tailed = profile.with_lengths(*TAIL)
    for num_gpus in sizes:
        choices = [
            Layout(
                workers=num_gpus // 2 // profile.gpus_per_worker,
                world_size=num_gpus // 2,
                max_policy_age=age,
                groups_per_step=num_gpus,
            )
            for age in AGES
        ]
        yield from scaling.forecasts(tailed, choices)


def scale_row(quick: bool) -> Row:
    """Of the profile in the repository."""
    sizes = QUICK_SIZES if quick else SIZES
    found = list(at_sizes(StageProfile.read(PROFILE), sizes))
    by_size = [found[i : i + len(AGES)] for i in range(0, len(found), len(AGES))]
    figures = [
        f"{size:,} GPUs: "
        + ", ".join(f"age {f.layout.max_policy_age} {f.groups_per_s:.3g}/s" for f in forecasts)
        for size, forecasts in zip(sizes, by_size, strict=True)
    ]
    is_sound = all(
        f.age_max <= f.layout.max_policy_age
        and f.num_drawn == f.num_used + f.num_dropped + f.num_under_way
        for f in found
    )
    pays = all(forecasts[-1].groups_per_s > forecasts[0].groups_per_s for forecasts in by_size)
    return judged(
        f"simulated groups/s of {sizes[0]} to {sizes[-1]:,} GPUs with a long tail of lengths, "
        "from stage times of two CPU cores" + (" (QUICK: the smaller ones)" if quick else ""),
        "; ".join(figures),
        "no group lost or too old; running ahead is faster than sync at each size",
        is_sound and pays,
    )


def main(arguments: Sequence[str]) -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if not arguments or arguments[0] not in ("validate", "compare", "scale"):
        print(__doc__, file=sys.stderr)
        return 2
    command, *places = arguments
    if command == "scale":
        profile = StageProfile.read(Path(places[0]) if places else PROFILE)
        found = list(at_sizes(profile, SIZES))
        console.print(scaling.table(found))
        return 0
    if command == "validate":
        runs, lengths = make_runs(Path(places[0]), STEPS), NEAR_UNIFORM
    else:
        runs, lengths = [RunDir(place) for place in places], "lengths as they were"
    shown = list(validated([StageProfile.of_run(run) for run in runs], lengths))
    for row in shown:
        console.print(f"{row.claim}: {row.measured}\n  {row.bound}: {row.verdict}. {row.why}")
    return int(any(row.verdict != "holds" for row in shown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
