"""Hone beside TRL's GRPOTrainer, and beside its own stages alone: samples/s of one machine.

Both systems start from the same warmed-up weights and train on the same tasks by the same rule, 128
samples a step, in float32 with AdamW. Hone is `hone train`, a step is the time between two weight
syncs; TRL runs in an environment of its own with the fastest of some micro-batch sizes. They take
turns (Hone, TRL, TRL, Hone): a turn counts with its mean step, because steps that run ahead borrow
from each other, and the median is over turns. Run one part with `python -m benchmarks.throughput
FOLDER long|short|stages`; finished runs in FOLDER count again.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from rich.console import Console

from benchmarks import simulation, stage_ceilings, trl_environment
from benchmarks.proofs import ROOT
from benchmarks.show import Part, Row, judged, measured
from benchmarks.stage_ceilings import Ceilings
from benchmarks.study import train, training_tasks, warm_started
from benchmarks.synced_steps import Turn, turn_of
from benchmarks.trl_environment import PeerRun
from cluster import config_file
from cluster.config import Config
from cluster.errors import StageError
from cluster.run_dir import RunDir
from cluster.stage_profile import StageProfile
from rewards.tasksets import load_tasks

CONFIG = ROOT / "benchmarks" / "tailed.yaml"
SAME_LENGTH = 0.1  # difference in mean tokens that still counts as the same work
EFFICIENCY, WAIT = 0.85, 0.1
PAUSE_S, PROBE = 0.2, 0.02
ASYNC_AGE = 4
STAGES_PLACE = 4  # of turns that lie between two measurements of the stages alone


@dataclass(frozen=True)
class Case:
    """Lengths to compare at; steps are those that count, of one turn, after `num_first`, a minute
    or more in which the pipeline fills and a rollout worker is prepared to stand by. Of the peer's
    `micro_batches`, in samples, `num_tried_steps` each tell the fastest.
    """

    key: str
    name: str
    max_new_tokens: int
    num_first: int
    num_steps: int
    num_peer_steps: int
    micro_batches: Sequence[int]
    num_tried_steps: int
    at_least: float  # samples/s of Hone over those of the peer


LONG = Case(
    "long", "long-tailed completions (geometric, cut at 256 tokens)",
    256, 18, 12, 5, (128, 32), 2, 4.0,
)  # fmt: skip
SHORT = Case(
    "short", "short completions (at most 16 tokens)",
    16, 100, 40, 20, (128, 64, 32, 16), 3, 0.9,
)  # fmt: skip


class Bench:
    """Runs in one folder, all from the policy that is warmed up there first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._start = warm_started(CONFIG, self._folder / "policy", 0, training_tasks)

    def config(self, changes: Sequence[str]) -> Config:
        return config_file.load(CONFIG, [*self._start, *changes])

    def hone(self, case: Case, max_policy_age: int, place: int) -> RunDir:
        """A run; parts that ask for the same one, `place` included, share it."""
        name = f"tokens-{case.max_new_tokens}-age-{max_policy_age}-turn-{place}"
        changes = [
            f"rollout.max_new_tokens={case.max_new_tokens}",
            f"rollout.max_policy_age={max_policy_age}",
            f"run.steps={case.num_first + case.num_steps}",
        ]
        train(CONFIG, self._folder, name, [*self._start, *changes])
        return RunDir(self._folder / name)

    def default_age(self) -> int:
        return self.config([]).rollout.max_policy_age

    def peer(self, case: Case, micro_batch: int, num_steps: int, seed: int) -> PeerRun:
        """`seed` draws tasks and completions: runs of few steps should differ in it."""
        config = self.config([f"rollout.max_new_tokens={case.max_new_tokens}", f"run.seed={seed}"])
        tasks = self._folder / "tasks.jsonl"
        if not tasks.exists():
            write_tasks(config, tasks)
        return trl_environment.measure(config, tasks, micro_batch, num_steps)

    def ceilings(self) -> Ceilings:
        """At the lengths and slots of the config as it is."""
        return stage_ceilings.measure(self._folder / "stages", CONFIG, self._start)


def write_tasks(config: Config, path: Path) -> None:
    """The training tasks, one JSON object with `prompt` and `reference` a line."""
    lines = [
        json.dumps(
            {
                "prompt": [{"role": m.role, "content": m.content} for m in task.messages],
                "reference": task.reference,
            }
        )
        for task in load_tasks(config.tasks, "train")
    ]
    path.write_text("".join(f"{line}\n" for line in lines))


def against_trl(bench: Bench, case: Case, quick: bool) -> Iterator[Row]:
    age, num_samples = bench.default_age(), _samples_per_step(bench.config([]))
    claim = (
        f"samples/s against TRL's GRPOTrainer, {case.name}, {num_samples} a step; of Hone without "
        f"the first {case.num_first} steps and those beside which a worker is prepared to stand by"
    )
    try:
        trl_environment.environment()
    except StageError as error:
        yield Row(claim, "not measured", bound_of(case), "not shown here", str(error)[-300:])
        return
    tried = [bench.peer(case, size, case.num_tried_steps, 0) for size in case.micro_batches]
    micro_batch = min(tried, key=lambda run: run.median_step_s).micro_batch
    ours: list[Turn] = []
    theirs: list[PeerRun] = []
    order = ("hone", "trl") if quick else ("hone", "trl", "trl", "hone")
    for place, system in enumerate(order):
        if system == "trl":
            theirs.append(bench.peer(case, micro_batch, case.num_peer_steps, seed=place))
        else:
            ours.append(turn_of(bench.hone(case, age, place), case.num_first))
    yield faster(claim + (" (QUICK: one order)" if quick else ""), case, ours, theirs, num_samples)
    yield synced(f"weight sync of these runs, {case.name}", ours)


def faster(
    claim: str, case: Case, ours: Sequence[Turn], theirs: Sequence[PeerRun], num_samples: int
) -> Row:
    """Samples/s of Hone over those of the peer, each the median over its turns."""
    our_s = median(turn.mean_step_s for turn in ours)
    their_s = median(run.mean_step_s for run in theirs)
    our_tokens = fmean(turn.tokens for turn in ours)
    their_tokens = fmean(n / num_samples for run in theirs for n in run.tokens)
    is_same_work = abs(our_tokens / their_tokens - 1.0) <= SAME_LENGTH
    ratio = their_s / our_s
    turns = ", ".join(f"{turn.mean_step_s:.2f}" for turn in ours)
    peer_turns = ", ".join(f"{run.mean_step_s:.2f}" for run in theirs)
    peer = theirs[0]
    return judged(
        claim,
        f"{ratio:.2f}x: Hone {num_samples / our_s:.1f}/s (turns of {turns} s a step, mean "
        f"{our_tokens:.0f} tokens), TRL {peer.version} {num_samples / their_s:.1f}/s "
        f"(turns of {peer_turns} s a step, {their_tokens:.0f} tokens; micro-batches of "
        f"{peer.micro_batch}, the fastest of {', '.join(map(str, case.micro_batches))}, "
        f"{peer.threads} threads); {peer.num_parameters / 1e6:.1f} M parameters",
        bound_of(case),
        ratio >= case.at_least and is_same_work,
        "" if is_same_work else "the two did not sample the same lengths",
    )


def bound_of(case: Case) -> str:
    return f"at least {case.at_least:g}x; lengths within {SAME_LENGTH:.0%}"


def stages(bench: Bench) -> Iterator[Row]:
    """Overlap, and what the learner waits for: the long tail in all three modes. The stages alone
    are measured before and after the runs, because a machine is not steady.
    """
    modes = {"sync": 0, "by default": bench.default_age(), "async": ASYNC_AGE}
    before = bench.ceilings()
    runs = {mode: bench.hone(LONG, age, STAGES_PLACE) for mode, age in modes.items()}
    after = bench.ceilings()
    turns = {mode: turn_of(run, LONG.num_first) for mode, run in runs.items()}
    yield overlapped(modes, turns, before, after)
    yield waited(turns)
    yield synced("weight sync of the same runs, by default", [turns["by default"]])
    profiles = [StageProfile.of_run(run) for run in runs.values()]
    yield from simulation.validated(profiles, "long-tailed lengths")


def overlapped(
    ages: Mapping[str, int], turns: Mapping[str, Turn], before: Ceilings, after: Ceilings
) -> Row:
    alone = Ceilings(*map(fmean, zip(before, after, strict=True)))
    efficiency = {mode: alone.bound_s / turn.mean_step_s for mode, turn in turns.items()}
    shown = "; ".join(
        f"{mode} (age {age}): {turns[mode].mean_step_s:.2f} s a step, {efficiency[mode]:.2f}"
        for mode, age in ages.items()
    )
    return judged(
        "overlap efficiency: the slower stage alone over the mean step, long-tailed lengths",
        f"generate alone {alone.generate_s:.2f} s ({before.generate_s:.2f} before and "
        f"{after.generate_s:.2f} after the runs), learn alone {alone.learn_s:.2f} s "
        f"({before.learn_s:.2f}, {after.learn_s:.2f}); {shown}",
        f"at least {EFFICIENCY:g} by default",
        efficiency["by default"] >= EFFICIENCY,
    )


def waited(turns: Mapping[str, Turn]) -> Row:
    return judged(
        "share of the time that the learner waits for groups, long-tailed lengths",
        ", ".join(
            f"{mode} {turn.waits:.0%}"
            + ("" if turn.ranks_idle is None else f" (ranks' own view {turn.ranks_idle:.0%})")
            for mode, turn in turns.items()
        ),
        f"async below {WAIT:.0%}",
        turns["async"].waits < WAIT,
    )


def synced(claim: str, turns: Sequence[Turn]) -> Row:
    """How long engines stand still, and what the probe takes of a step, most of it beside the next
    one.
    """
    pause_s = max(turn.pause_s for turn in turns)
    probe_s = median(turn.probe_s for turn in turns)
    share = probe_s / median(turn.mean_step_s for turn in turns)
    return judged(
        f"{claim}: engines stand still; the probe",
        f"median pause {pause_s:.3f} s; probe {probe_s:.3f} s, {share:.1%} of a step",
        f"below {PAUSE_S:g} s; below {PROBE:.0%}",
        pause_s < PAUSE_S and share < PROBE,
    )


def _samples_per_step(config: Config) -> int:
    return config.rollout.groups_per_step * config.rollout.group_size


def parts(folder: Path, quick: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    """Each may be measured alone; the warm policy is made by the first."""
    return {
        LONG.key: lambda: against_trl(Bench(folder), LONG, quick),
        SHORT.key: lambda: against_trl(Bench(folder), SHORT, quick),
        "stages": lambda: stages(Bench(folder)),
    }


def rows(quick: bool, folder: Path) -> Iterator[Row | Part]:
    for key, measure in parts(folder, quick).items():
        yield Part(f"throughput: {key}", measure)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2 or arguments[1] not in parts(Path(), quick=False):
        print(__doc__, file=sys.stderr)
        return 2
    folder, key = Path(arguments[0]), arguments[1]
    console = Console(highlight=False, markup=False)
    shown = list(measured(Part(key, parts(folder, quick=False)[key])))
    for row in shown:
        console.print(f"{row.claim}: {row.measured}\n  {row.bound}: {row.verdict}. {row.why}")
    return int(any(row.verdict == "falls short" for row in shown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
