"""Training runs as a study needs them: one config with changes, its metrics, and a figure of them.

Invariant: a run is `hone train` on a real engine and learner, and all its figures come from its own
`metrics.jsonl`. The runs of a seed share one warm start, made once. What is finished in the folder
of the study is taken as it is when its `study.json` says that it was made from the same config and
changes, so a study that was interrupted goes on and a study that was edited begins anew. Called by
the studies of this package, each of which is a command of its own: `python -m benchmarks.<study>
FOLDER`.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from actors.placement import QUIET_ENV
from benchmarks.proofs import ROOT, run_timed
from benchmarks.show import Row
from cluster import config_file
from cluster.config import Config
from cluster.errors import StageError
from cluster.run_dir import RunDir
from cluster.types import Task
from rewards.tasksets import load_splits
from serve.charts import Chart, Point, svg

HONE = [sys.executable, "-m", "serve.cli"]
TIMEOUT_S = 2400.0  # of one run
STAMP = "study.json"  # in a finished run or warm start: what it was made from
STYLE = """
svg { font: 12px sans-serif; background: #fff } .unit, .tick { fill: #5b6472 }
.grid { stroke: #e3e6eb } .axis { stroke: #5b6472 } .line { fill: none; stroke-width: 2 }
.s0 { stroke: #2a6fdb } .s1 { stroke: #0f9d6b } .s2 { stroke: #c77d00 } .s3 { stroke: #8a4fd0 }
.s4 { stroke: #c8385f } .s5 { stroke: #4b5a6e } .dot, .key { stroke: none } .band { opacity: .15 }
.key.s0, .dot.s0 { fill: #2a6fdb } .key.s1, .dot.s1 { fill: #0f9d6b }
.key.s2, .dot.s2 { fill: #c77d00 } .key.s3, .dot.s3 { fill: #8a4fd0 }
.key.s4, .dot.s4 { fill: #c8385f } .key.s5, .dot.s5 { fill: #4b5a6e }
"""
LEGEND_HEIGHT, WIDTH, HEIGHT = 22, 400, 230


@dataclass(frozen=True)
class Run:
    """A finished run: one mapping of metrics per step, step 0 before any update."""

    rows: Sequence[Mapping[str, float]]

    def curve(self, key: str) -> list[Point]:
        return [(row["step"], row[key]) for row in self.rows if key in row]

    def first(self, key: str) -> float:
        return self.curve(key)[0][1]

    def last(self, key: str, num_steps: int = 1) -> float:
        """Mean over the last `num_steps` that have it."""
        return fmean(value for _, value in self.curve(key)[-num_steps:])


def train(config: Path, folder: Path, name: str, changes: Sequence[str] = ()) -> Run:
    """Train to the end as `folder`/`name`, or read what a run of that name and of the same config
    and changes left there.
    """
    run_dir = RunDir(folder / name)
    if not (is_done(run_dir) and is_stamped(run_dir.path, config, changes)):
        shutil.rmtree(run_dir, ignore_errors=True)  # interrupted, or of another config
        hone("train", str(config), *changes, f"run.dir={folder}", "--run", name)
        stamp(run_dir.path, config, changes)
    return Run(run_dir.read_metrics())


def is_done(run_dir: RunDir) -> bool:
    """Whether the run came to its end: a report is written of failed and interrupted ones, too."""
    ends = [event for event in run_dir.read_events() if event.kind == "run_finished"]
    return bool(ends) and ends[-1].fields["outcome"] == "done"


def stamp(place: Path, config: Path, changes: Sequence[str]) -> None:
    """Note in `place` what it was made from."""
    (place / STAMP).write_text(_origin(place, config, changes))


def is_stamped(place: Path, config: Path, changes: Sequence[str]) -> bool:
    """Whether `place` is known to be made from this `config`, as it reads now, and `changes`."""
    file = place / STAMP
    return file.is_file() and file.read_text() == _origin(place, config, changes)


def _origin(place: Path, config: Path, changes: Sequence[str]) -> str:
    """Paths beside `place` are noted without their folder, which may be moved as a whole."""
    folder = f"{place.absolute().parent}/"
    relative = [change.replace(folder, "") for change in changes]
    return json.dumps({"config": config.read_text(), "changes": relative}, indent=1)


def warm_started(
    config: Path, place: Path, seed: int, tasks: Callable[[Config], list[Task]]
) -> list[str]:
    """Changes that start a run from the policy of `config` and `seed` after its warm start on
    `tasks`, which is made at `place` once for a `config` that reads the same, without engines.
    """
    place, own = place.absolute(), [f"run.seed={seed}"]
    settings = config_file.load(config, own)
    if not is_stamped(place, config, own):
        shutil.rmtree(place, ignore_errors=True)  # of another config
        _warm_up(settings, place, tasks(settings))
        stamp(place, config, own)
    return [
        *own,
        "warm_start=null",
        f"policy={{type: pretrained, model: {place}, "
        f"context_length: {settings.policy.context_length}}}",
    ]


def training_tasks(config: Config) -> list[Task]:
    return load_splits(config.tasks)[0]


def _warm_up(config: Config, place: Path, tasks: list[Task]) -> None:
    os.environ.update(QUIET_ENV)  # before torch, which not every study needs here, reads it
    from actors.prepared_policy import prepare_policy
    from learners.learner import Learner

    making = place.with_name(f"{place.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    policy = prepare_policy(config, tasks, making / "tiny", has_checkpoint=False, models=None)
    learner = Learner(
        config=config, policy_dir=policy.directory, rank=0, world_size=1, num_threads=1
    )
    for _ in learner.warm_start(policy.examples):
        pass
    learner.export_hf(making / "warm")
    learner.close()
    (making / "warm").rename(place)
    shutil.rmtree(making)


def hone(*arguments: str) -> str:
    """What a `hone` command prints, errors included. Raises `StageError` when it fails."""
    run = run_timed([*HONE, *arguments], ROOT, TIMEOUT_S)
    if run.code != 0:
        raise StageError("study", f"hone {' '.join(arguments)}: {run.output[-2000:]}")
    return run.output


def mean_curve(runs: Sequence[Run], key: str) -> list[Point]:
    """Mean over `runs` at each step at which all of them have `key`."""
    curves = [dict(run.curve(key)) for run in runs]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return [(step, fmean(curve[step] for curve in curves)) for step in steps]


def figure(charts: Sequence[Chart]) -> str:
    """`charts` of the same series side by side with one legend, as a stand-alone SVG."""
    width, height = WIDTH * len(charts), HEIGHT + LEGEND_HEIGHT
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">']
    parts.append(f"<style>{STYLE}</style>")
    for i, (colour, name) in enumerate(charts[0].legend):
        x = 54 + i * 130
        parts.append(f'<rect class="key s{colour}" x="{x}" y="6" width="10" height="10"/>')
        parts.append(f'<text class="tick" x="{x + 14}" y="15">{name}</text>')
    for i, chart in enumerate(charts):
        place = f'x="{i * WIDTH}" y="{LEGEND_HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(str(svg(chart)).replace("<svg ", f"<svg {place} ", 1))
    return "\n".join([*parts, "</svg>\n"])


def main(rows: Callable[[bool, Path], Iterable[Row]]) -> None:
    """Measure and print the rows of one study in the folder that the command names; QUICK=1 takes
    one seed, which a later call without it takes over. Exit code 1 when a row falls short.
    """
    if len(sys.argv) != 2:
        sys.exit(f"usage: [QUICK=1] python -m benchmarks.{Path(sys.argv[0]).stem} FOLDER")
    has_short = False
    for row in rows(os.environ.get("QUICK", "0") not in ("", "0"), Path(sys.argv[1]).absolute()):
        print(f"{row.verdict}: {row.claim}: {row.measured} (bound: {row.bound}) {row.why}")
        has_short |= row.verdict == "falls short"
    sys.exit(int(has_short))
