"""`report.html` of a run: one self-contained page with curves, samples, events and the config.

Invariant: the page is made from the files of the run directory alone, needs no network and no
script, and shows no number that is not in those files. Called by `hone report` and `hone train`.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster import status as run_status
from cluster.errors import ConfigError
from cluster.run_dir import Event, RunDir, Sample
from serve import charts
from serve.charts import Chart, Series
from serve.status_view import duration

MAX_SAMPLE_STEPS = 6
MAX_EVENTS = 200
_TEMPLATES = Path(__file__).parent / "templates"
_SIGNAL = re.compile(r"reward/[^/]+/mean")
Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class ChartSpec:
    """A chart by metric keys and their labels; a key ending in `*` takes all keys that begin so."""

    title: str
    unit: str
    labels: Mapping[str, str]
    kind: Literal["line", "stack"] = "line"
    spread: str = ""  # key of a standard deviation around the first series
    is_annotated: bool = False
    bounds: tuple[float, float] | None = None
    min_series: int = 1


CHARTS = (
    ChartSpec("Reward", "mean ± std", {"reward/mean": "mean"}, "line", "reward/std", True),
    ChartSpec(
        "Held-out evaluation",
        "share solved",
        {"eval/pass@1": "pass@1", "eval/pass@k": "pass@k"},
        is_annotated=True,
        bounds=(0.0, 1.0),
    ),
    ChartSpec("Reward by signal", "mean score", {"reward/*": ""}, min_series=2),
    ChartSpec(
        "Entropy",
        "nats per token",
        {"policy/entropy": "all tokens", "policy/nucleus_entropy": "nucleus"},
    ),
    ChartSpec("Engine-learner gap", "mean |log-prob difference|", {"ratio/mismatch_abs_mean": ""}),
    ChartSpec("Engine-learner KL", "nats per token", {"ratio/mismatch_kl": ""}),
    ChartSpec("Loss", "sum of weighted objectives", {"loss/total": ""}),
    ChartSpec("Loss by objective", "before weighting", {"loss/*": ""}, min_series=2),
    ChartSpec("Gradient norm", "before clipping", {"grad/norm": ""}),
    ChartSpec("Policy age", "steps", {"policy_age/mean": "mean", "policy_age/max": "max"}),
    ChartSpec(
        "Throughput",
        "tokens per s",
        {"rollout/tokens_per_s": "rollout", "learner/tokens_per_s": "learner"},
    ),
    ChartSpec("Waiting of each stage", "s per step", {"time/wait_s/*": ""}, kind="stack"),
    ChartSpec("Step time", "s", {"time/step_s": ""}),
    ChartSpec("Completion length", "tokens", {"rollout/completion_tokens_mean": ""}),
    ChartSpec(
        "Shares",
        "share",
        {
            "group/uniform_fraction": "uniform groups",
            "rollout/truncated_fraction": "truncated",
            "reward/abstain_fraction": "abstained",
            "ratio/clip_fraction": "clipped",
        },
        bounds=(0.0, 1.0),
    ),
)
SUMMARY = {
    "eval/pass@1": "Held-out pass@1",
    "eval/pass@k": "Held-out pass@k",
    "reward/mean": "Reward",
    "reward/pass_rate": "Pass rate in training",
    "policy/entropy": "Entropy, nats per token",
    "rollout/completion_tokens_mean": "Completion length, tokens",
    "rollout/truncated_fraction": "Truncated share",
    "group/uniform_fraction": "Uniform groups",
    "ratio/mismatch_abs_mean": "Engine-learner log-prob gap",
    "grad/norm": "Gradient norm",
    "policy_age/mean": "Policy age, steps",
    "rollout/tokens_per_s": "Rollout tokens per s",
    "time/step_s": "Step time, s",
}


@dataclass(frozen=True)
class Change:
    """One row of the summary: means over the first and the last `window` values of a key."""

    name: str
    start: float
    end: float
    window: int


@dataclass(frozen=True)
class EventRow:
    """Consecutive events of one kind; `text` shows the fields of the last one."""

    after: str
    kind: str
    count: int
    text: str


def write(run_dir: RunDir) -> Path:
    """Rewrite `report.html` and return its path; `ConfigError` when the run has no metrics."""
    metrics = run_dir.read_metrics()
    if not metrics:
        raise ConfigError(f"{run_dir.metrics}: no metrics yet, nothing to report")
    status = run_status.read(run_dir.path)
    events = run_dir.read_events()
    page = _environment().get_template("report.html.j2").render(
        run=run_dir.name,
        status=status,
        steps=int(metrics[-1]["step"]),
        total=duration(events[-1].time - events[0].time) if events else "",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        outcome=outcome(metrics),
        changes=changes(metrics),
        window=_window(len(metrics)),
        charts=[(chart, charts.svg(chart)) for chart in build_charts(metrics)],
        samples=choose_samples(run_dir.read_samples()),
        events=event_rows(events),
        config=run_dir.config.read_text(),
        number=charts.number,
    )  # fmt: skip
    temporary = run_dir.report.with_suffix(".tmp")
    temporary.write_text(page)
    temporary.replace(run_dir.report)
    return run_dir.report


def outcome(metrics: Rows) -> list[str]:
    """What came of the run, in plain sentences: held-out pass@1 and reward, first against last."""
    lines: list[str] = []
    evals = [(row["step"], row["eval/pass@1"]) for row in metrics if "eval/pass@1" in row]
    if len(evals) > 1:
        (first_step, first), (last_step, last) = evals[0], evals[-1]
        lines.append(
            f"held-out pass@1 {first:.3f} at step {first_step:.0f}, {last:.3f} at step "
            f"{last_step:.0f} ({last - first:+.3f})"
        )
    reward = _change(metrics, "reward/mean", "")
    if reward is not None:
        lines.append(
            f"training reward {reward.start:.3f} at first, {reward.end:.3f} at last "
            f"(means of {reward.window} step{'s' if reward.window > 1 else ''})"
        )
    return lines


def changes(metrics: Rows) -> list[Change]:
    """Start against end of the metrics that a person asks for first."""
    found = [_change(metrics, key, name) for key, name in SUMMARY.items()]
    return [change for change in found if change is not None]


def build_charts(metrics: Rows) -> list[Chart]:
    """The charts that this run has data for."""
    known = {key for row in metrics for key in row}
    built: list[Chart] = []
    for spec in CHARTS:
        named = [
            Series(label or spec.title, *_points(metrics, key, spec))
            for key, label in _expand(spec.labels, known)
        ]
        series = [one for one in named if one.points]
        if len(series) >= spec.min_series:
            built.append(
                Chart(spec.title, spec.unit, series, spec.kind, spec.is_annotated, spec.bounds)
            )
    return built


def choose_samples(samples: Sequence[Sample]) -> list[tuple[int, list[Sample]]]:
    """(step, samples) of a few steps spread over the run, the first and the last among them."""
    by_step: dict[int, list[Sample]] = {}
    for sample in samples:
        by_step.setdefault(sample.step, []).append(sample)
    steps = sorted(by_step)
    if len(steps) > MAX_SAMPLE_STEPS:
        gap = (len(steps) - 1) / (MAX_SAMPLE_STEPS - 1)
        steps = [steps[round(i * gap)] for i in range(MAX_SAMPLE_STEPS)]
    return [(step, by_step[step]) for step in steps]


def event_rows(events: Sequence[Event]) -> list[EventRow]:
    """The timeline; neighbours of one kind become one row with a count."""
    rows: list[EventRow] = []
    for event in events:
        text = ", ".join(f"{key} {_short(value)}" for key, value in event.fields.items())
        count = 1
        if rows and rows[-1].kind == event.kind:
            count += rows.pop().count
        after = duration(event.time - events[0].time)
        rows.append(EventRow(after, event.kind, count, text))
    return rows[-MAX_EVENTS:]


def _change(metrics: Rows, key: str, name: str) -> Change | None:
    values = [row[key] for row in metrics if key in row]
    if not values:
        return None
    window = 1 if key.startswith("eval/") else _window(len(values))
    return Change(name, fmean(values[:window]), fmean(values[-window:]), window)


def _window(num_rows: int) -> int:
    return min(10, max(1, num_rows // 5))


def _expand(labels: Mapping[str, str], known: set[str]) -> list[tuple[str, str]]:
    """(key, label) of the keys that the run has; stars leave totals out."""
    found: list[tuple[str, str]] = []
    for key, label in labels.items():
        if key == "reward/*":
            found += [(k, k.split("/")[1]) for k in sorted(known) if _SIGNAL.fullmatch(k)]
        elif key.endswith("*"):
            begin = key[:-1]
            parts = sorted(k.removeprefix(begin) for k in known if k.startswith(begin))
            found += [(begin + part, part) for part in parts if part != "total"]
        elif key in known:
            found.append((key, label))
    return found


def _points(
    metrics: Rows, key: str, spec: ChartSpec
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Points and band of a key. Step 0 comes before training: only evaluations count there."""
    rows = [row for row in metrics if key in row and (row["step"] > 0 or key.startswith("eval/"))]
    spread = spec.spread
    band = [
        (row["step"], row[key] - row[spread], row[key] + row[spread])
        for row in rows
        if spread in row
    ]
    return [(row["step"], row[key]) for row in rows], band


def _short(value: object) -> str:
    if isinstance(value, float):
        return charts.number(value)
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
