"""Seconds of training until the same held-out accuracy: Hone beside TRL's GRPOTrainer.

Sums of reasoning_gym (`chain_sums.yaml`), of which the warm-started policy that both start from has
seen some worked out. Same tasks, reward, objective, optimizer, constant learning rate, 128 samples
a step; Hone with its default policy age. The mark is nine tenths of what the one that learns less
gains, on the straight line between two evaluations: nobody is timed at its luckiest one.

Neither clock counts the start of a system or the evaluations. Hone evaluates itself every
`eval.every` steps; TRL saves its weights as often, off its clock, and `hone eval` measures them
afterwards on the same tasks with the same seeds. While Hone evaluates, its engines run ahead: the
steps that use what they made then count as much as the other ones until the next evaluation. Nor is
it counted that Hone imports a rollout worker to stand by beside its first steps: these count as the
later ones until the next evaluation, or as those of the first interval that has later ones.
Run with `[QUICK=1] python -m benchmarks.time_to_accuracy FOLDER`; what is finished in FOLDER, the
peer's runs and evaluations included, counts again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import msgspec

from benchmarks import throughput, trl_environment
from benchmarks.proofs import ROOT
from benchmarks.show import Row, judged
from benchmarks.study import hone, main, train, training_tasks, warm_started
from benchmarks.synced_steps import num_beside_standby
from benchmarks.throughput import LONG
from benchmarks.trl_environment import PeerRun
from cluster import config_file
from cluster.errors import StageError
from cluster.run_dir import RunDir

CONFIG = ROOT / "benchmarks" / "chain_sums.yaml"
PASS, STEP_S = "eval/pass@1", "time/step_s"
AT_MOST = 1 / 3  # seconds of Hone over those of the peer, in every run
LEARNT = 0.1  # that the mark must lie above the start
MARK = 0.9  # of the gain of the one that learns less


class Point(NamedTuple):
    """Held-out accuracy after `step` steps and `seconds` of training."""

    step: float
    seconds: float
    accuracy: float


Curve = Sequence[Point]  # from step 0 on, which comes before any update


@dataclass(frozen=True)
class Comparison:
    """Both curves of one seed; they start from the same weights."""

    hone: Curve
    trl: Curve

    @property
    def start(self) -> float:
        return self.hone[0].accuracy

    @property
    def mark(self) -> float:
        """An accuracy that both have reached well before their best one."""
        return self.start + MARK * (min(best(self.hone), best(self.trl)) - self.start)

    @property
    def has_learnt(self) -> bool:
        return self.mark - self.start >= LEARNT

    @property
    def ratio(self) -> float:
        """Seconds of Hone over those of TRL until the mark; NaN where that is the start."""
        ours, theirs = reached(self.hone, self.mark), reached(self.trl, self.mark)
        return ours.seconds / theirs.seconds if theirs.seconds else float("nan")

    def __str__(self) -> str:
        ours, theirs = reached(self.hone, self.mark), reached(self.trl, self.mark)
        return (
            f"Hone {_spent(ours)}, TRL {_spent(theirs)}, ratio {self.ratio:.2f}, "
            f"accuracy {self.start:.3f} -> {self.mark:.3f} (best: Hone {best(self.hone):.3f}, "
            f"TRL {best(self.trl):.3f})"
        )


def best(curve: Curve) -> float:
    return max(point.accuracy for point in curve)


def reached(curve: Curve, mark: float) -> Point:
    """Where the line through the evaluations first comes to `mark`, which is on the curve."""
    if curve[0].accuracy >= mark:
        return curve[0]
    before, after = next(pair for pair in pairwise(curve) if pair[1].accuracy >= mark)
    share = (mark - before.accuracy) / (after.accuracy - before.accuracy)
    step, seconds = (b + share * (a - b) for b, a in zip(before[:2], after[:2], strict=True))
    return Point(step, seconds, mark)


def _spent(point: Point) -> str:
    step_s = point.seconds / max(1.0, point.step)
    return f"{point.seconds:.0f} s ({point.step:.1f} steps of {step_s:.2f} s)"


def curve_of(
    rows: Sequence[Mapping[str, float]], num_ahead: int, num_beside_standby: int = 0
) -> Curve:
    """Of a run's metrics. `time/step_s` ends before an evaluation; the `num_ahead` steps after one
    may use rollouts that were made during it, and count as the mean of the others until the next.
    Before the first evaluation, of step 0, nothing is sampled. The first `num_beside_standby` steps
    count as the others of their interval, too, or as those of the first one that has others.

    Raises `ValueError` where no step between two evaluations is left to count.
    """
    evaluated = [row for row in rows if PASS in row]
    step_s = {int(row["step"]): row[STEP_S] for row in rows if STEP_S in row}
    means: list[float | None] = []  # of an interval's steps that count
    for before, after in pairwise(evaluated):
        first, last = int(before["step"]), int(after["step"])
        unaided = range(first + 1 + (num_ahead if first else 0), last + 1)
        if not unaided:
            raise ValueError(f"eval.every must be above {num_ahead}, got {last - first}")
        counted = [step_s[step] for step in unaided if step > num_beside_standby]
        means.append(fmean(counted) if counted else None)
    known = [mean for mean in means if mean is not None]
    if not known:
        raise ValueError(f"a worker was prepared to stand by until step {num_beside_standby}")
    curve = [Point(0, 0.0, evaluated[0][PASS])]
    for mean, after in zip(means, evaluated[1:], strict=True):
        seconds = (after["step"] - curve[-1].step) * (known[0] if mean is None else mean)
        curve.append(Point(after["step"], curve[-1].seconds + seconds, after[PASS]))
    return curve


class Bench:
    """Runs of one seed in one folder, all from the policy that is warmed up there first."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.absolute()
        self._seed = seed
        self._start = warm_started(CONFIG, self._folder / f"policy-{seed}", seed, training_tasks)
        self._config = config_file.load(CONFIG, self._start)

    def hone(self) -> Curve:
        name = f"hone-{self._seed}"
        run = train(CONFIG, self._folder, name, self._start)
        beside = num_beside_standby(RunDir(self._folder / name))
        return curve_of(run.rows, self._config.rollout.max_policy_age + 1, beside)

    def peer(self) -> tuple[PeerRun, dict[int, float]]:
        """With the faster micro-batch size: the run, and accuracies after its steps."""
        every, num_steps = self._config.eval.every, self._config.run.steps
        tried = [
            self._measured(f"trl-{self._seed}-tried-{size}", size, LONG.num_tried_steps)
            for size in LONG.micro_batches
        ]
        micro_batch = min(tried, key=lambda run: run.median_step_s).micro_batch
        name = f"trl-{self._seed}"
        run = self._measured(name, micro_batch, num_steps - 1, every)  # and one to warm up
        return run, {s.step: self._accuracy(self._folder / name, s.step) for s in run.saved}

    def _measured(
        self, name: str, micro_batch: int, num_steps: int, save_every: int = 0
    ) -> PeerRun:
        kept = self._folder / f"{name}.json"
        if not kept.exists():
            tasks = self._folder / "tasks.jsonl"
            if not tasks.exists():
                throughput.write_tasks(self._config, tasks)
            run = trl_environment.measure(
                self._config, tasks, micro_batch, num_steps, save_every, self._folder / name
            )
            _write(kept, msgspec.json.encode(run))
        return msgspec.json.decode(kept.read_bytes(), type=PeerRun)

    def _accuracy(self, place: Path, step: int) -> float:
        """pass@1 of the weights at `place`/step-N, as the runs of Hone evaluate their own."""
        kept = place / f"step-{step}.json"
        if not kept.exists():
            weights = str(place / f"step-{step}")
            printed = hone("eval", weights, str(CONFIG), *self._start, "--json")
            result = json.JSONDecoder().raw_decode(printed, f"\n{printed}".rindex("\n{\n"))[0]
            _write(kept, json.dumps(result).encode())
        return json.loads(kept.read_text())["pass@1"]["value"]


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    making = path.with_name(f"{path.name}.making")
    making.write_bytes(data)
    making.rename(path)


def compare(folder: Path, seed: int) -> tuple[Comparison, PeerRun]:
    """The two take turns to be the first."""
    bench = Bench(folder, seed)
    ours = bench.hone() if seed % 2 == 0 else None
    run, accuracies = bench.peer()
    ours = ours or bench.hone()
    later = [Point(s.step, s.seconds, accuracies[s.step]) for s in run.saved]
    return Comparison(ours, [Point(0, 0.0, ours[0].accuracy), *later]), run


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """One row over both seeds; `quick` takes one and says so."""
    seeds = [0] if quick else [0, 1]
    claim = (
        "seconds of training until the same held-out accuracy, reasoning_gym chain_sum, against "
        "TRL's GRPOTrainer; start and evaluations of either not counted, nor that Hone prepares a "
        "worker to stand by meanwhile, "
    ) + ("seed 0 (QUICK: one seed)" if quick else f"{len(seeds)} seeds")
    bound = f"at most a third of TRL's, the mark at least {LEARNT:g} above the start"
    try:
        trl_environment.environment()
    except StageError as error:
        yield Row(claim, "not measured", bound, "not shown here", str(error)[-300:])
        return
    found = [compare(folder, seed) for seed in seeds]
    run = found[0][1]
    flat = [seed for seed, (result, _) in zip(seeds, found, strict=True) if not result.has_learnt]
    yield judged(
        claim,
        "; ".join(str(result) for result, _ in found)
        + f"; TRL {run.version}, micro-batches of {run.micro_batch}, {run.threads} threads; "
        f"{run.num_parameters / 1e6:.1f} M parameters",
        bound,
        not flat and all(result.ratio <= AT_MOST for result, _ in found),
        f"seeds {flat}: the mark is less than {LEARNT:g} above the start" if flat else "",
    )


if __name__ == "__main__":
    main(rows)
