"""Training runs as a study needs them: one config with changes, its metrics, and a figure of them.

Invariant: a run is `hone train` on a real engine and learner, and all its figures come from its own
`metrics.jsonl`. A finished run in the folder of the study is taken as it is, so a study that was
interrupted goes on. Called by the studies of this package.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.proofs import ROOT, run_timed
from cluster import config_file
from cluster.errors import StageError
from cluster.run_dir import RunDir
from serve.charts import Chart, Point, svg

HONE = [sys.executable, "-m", "serve.cli"]
TIMEOUT_S = 900.0
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
    """Train to the end as `folder`/`name`, or read what a run of that name left there."""
    run_dir = RunDir(folder / name)
    if not is_done(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)  # of an interrupted study
        _hone("train", str(config), *changes, f"run.dir={folder}", "--run", name)
    return Run(run_dir.read_metrics())


def is_done(run_dir: RunDir) -> bool:
    """Whether the run came to its end: a report is written of failed and interrupted ones, too."""
    ends = [event for event in run_dir.read_events() if event.kind == "run_finished"]
    return bool(ends) and ends[-1].fields["outcome"] == "done"


def warm_started(config: Path, folder: Path, seed: int) -> list[str]:
    """Changes that start a run from the warm-started policy of `seed`, made here once: a run of one
    step at a rate too small to move a weight.
    """
    policy = folder / f"policy-{seed}"
    length = config_file.load(config).policy.context_length
    if not policy.is_dir():
        still = [f"run.seed={seed}", "run.steps=1", "learner.lr=1e-30", "eval.tasks=1"]
        train(config, folder, f"warm-{seed}", still)
        _hone("export", str(folder / f"warm-{seed}"), str(policy))
    return [
        f"run.seed={seed}",
        "warm_start=null",
        f"policy={{type: pretrained, model: {policy}, context_length: {length}}}",
    ]


def _hone(*arguments: str) -> None:
    run = run_timed([*HONE, *arguments], ROOT, TIMEOUT_S)
    if run.code != 0:
        raise StageError("study", f"hone {' '.join(arguments)}: {run.output[-2000:]}")


def mean_curve(runs: Sequence[Run], key: str) -> list[Point]:
    """Mean over `runs` of the same length, at each step that has `key`."""
    curves = [run.curve(key) for run in runs]
    return [(points[0][0], fmean(y for _, y in points)) for points in zip(*curves, strict=True)]


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
