"""The report: self-contained, safe, complete and honest about what the run files say."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from cluster import status
from cluster.errors import ConfigError
from cluster.run_dir import Event, RunDir, Sample
from cluster.status import RunStatus
from cluster.types import Verdict
from serve import charts, report
from serve.charts import Chart, Series

ATTACK = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs", "demo", f"note: {json.dumps(ATTACK)}\n", exist_ok=False)
    run.append_event("run_started", run="demo")
    run.append_metrics(0, {"eval/pass@1": 0.125, "eval/pass@k": 0.25})
    for step in range(1, 41):
        values = {
            "reward/mean": step / 40,
            "reward/std": 0.1,
            "reward/correct/mean": step / 40,
            "reward/format/mean": 1.0,
            "policy/entropy": 2.0 - step / 40,
            "loss/total": -0.01,
            "grad/norm": 0.5,
            "policy_age/mean": 0.5,
            "policy_age/max": 1.0,
            "rollout/tokens_per_s": 900.0,
            "time/step_s": 2.0,
            "time/wait_s/dispatch": 0.5,
            "time/wait_s/learn": 1.0,
        }
        run.append_metrics(step, values | ({"eval/pass@1": 0.75} if step == 40 else {}))
        run.append_event("sync", policy_version=step)
        run.append_sample(
            Sample(
                step=step,
                group_id="g",
                task_id="t",
                prompt=f"prompt of step {step}",
                completion=ATTACK,
                reward=None if step == 40 else 0.5,
                reference="34",
                verdicts=[Verdict(score=None, name="math", error="timed out")],
            )
        )
    run.append_event("run_finished", step=40)
    status.write(run.path, RunStatus(run="demo", phase="finished", step=40, steps=40))
    return run


def test_the_page_is_self_contained_and_safe(run_dir: RunDir):
    page = report.write(run_dir).read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(" in page
    assert not re.search(r"<[^>]*\s(src|href|on\w+)\s*=|url\(|@import|https?://", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_page_tells_the_story(run_dir: RunDir):
    page = report.write(run_dir).read_text()
    assert "held-out pass@1 0.125 at step 0, 0.750 at step 40 (+0.625)" in page
    for title in ("Reward", "Held-out evaluation", "Reward by signal", "Entropy", "Policy age",
                  "Waiting of each stage", "Throughput"):  # fmt: skip
        assert title in page
    assert "Completion length" not in page  # the run has no such metric
    assert "sync \u00d7 40" in page
    assert "none: a verifier abstained" in page
    assert "timed out" in page
    assert page.count("prompt of step") == report.MAX_SAMPLE_STEPS
    assert "prompt of step 1<" in page
    assert "prompt of step 40<" in page


def test_every_drawing_is_well_formed_and_inside_its_frame(run_dir: RunDir):
    page = report.write(run_dir).read_text()
    drawings = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 9
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        for element in root.iter():
            for pair in element.get("points", "").split():
                x, y = (float(value) for value in pair.split(","))
                assert 0 <= x <= charts.WIDTH
                assert charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1


def test_a_report_of_a_run_that_still_trains_and_has_little(tmp_path: Path):
    run = RunDir.create(tmp_path, "young", "", exist_ok=False)
    with pytest.raises(ConfigError, match="no metrics yet"):
        report.write(run)
    run.append_metrics(1, {"reward/mean": 0.5})
    page = report.write(run).read_text()
    assert "Reward" in page
    assert "kept no samples" in page


def test_the_report_is_replaced_as_a_whole(run_dir: RunDir):
    report.write(run_dir)
    run_dir.append_metrics(41, {"reward/mean": 0.1})
    assert "step 41" in report.write(run_dir).read_text()
    assert [p.name for p in run_dir.path.glob("report*")] == ["report.html"]


def test_changes_compare_the_ends(run_dir: RunDir):
    changes = {change.name: change for change in report.changes(run_dir.read_metrics())}
    reward = changes["Reward"]
    assert reward.window == 8
    assert math.isclose(reward.start, sum(range(1, 9)) / 8 / 40)
    assert math.isclose(reward.end, sum(range(33, 41)) / 8 / 40)
    evaluation = changes["Held-out pass@1"]
    assert (evaluation.start, evaluation.end, evaluation.window) == (0.125, 0.75, 1)


def test_neighbouring_events_of_one_kind_are_one_row():
    kinds = ["run_started", "sync", "sync", "checkpoint", "sync"]
    events = [Event(time=100.0 + i, kind=kind, fields={"n": i}) for i, kind in enumerate(kinds)]
    rows = [(row.after, row.kind, row.count, row.text) for row in report.event_rows(events)]
    assert rows == [
        ("0 s", "run_started", 1, "n 0"),
        ("2 s", "sync", 2, "n 2"),
        ("3 s", "checkpoint", 1, "n 3"),
        ("4 s", "sync", 1, "n 4"),
    ]


def points_of(drawing: str, css: str) -> list[tuple[float, float]]:
    match = re.search(rf'class="{css}" points="([^"]*)"', drawing)
    assert match
    pairs = [pair.split(",") for pair in match[1].split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_goes_where_the_values_are():
    chart = Chart("t", "u", [Series("a", [(0, 0.0), (5, 1.0), (10, 0.5)])], bounds=(0.0, 1.0))
    (x0, y0), (x1, y1), (x2, y2) = points_of(str(charts.svg(chart)), "line s0")
    assert (x0, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert math.isclose(x1, (x0 + x2) / 2, abs_tol=0.1)
    assert (y0, y1) == (charts.HEIGHT - charts.BOTTOM, charts.TOP)
    assert math.isclose(y2, (y0 + y1) / 2, abs_tol=0.1)


def test_a_stack_puts_layers_on_top_of_each_other():
    series = [Series("a", [(1, 1.0), (2, 1.0)]), Series("b", [(1, 3.0)])]
    drawing = str(charts.svg(Chart("t", "s", series, kind="stack")))
    lower, upper = points_of(drawing, "area s0"), points_of(drawing, "area s1")
    assert lower[0][1] == upper[-1][1]  # the top of a is the bottom of b at step 1
    assert upper[1] == upper[2]  # b adds nothing at step 2


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [5.0, 5.0], [-1e-9, 1e-9], [1e9, 2e9]])
def test_flat_tiny_and_huge_values_can_be_drawn(values: list[float]):
    chart = Chart("t", "u", [Series("a", list(enumerate(values)))], is_annotated=True)
    drawing = str(charts.svg(chart))
    ElementTree.fromstring(drawing)
    assert "nan" not in drawing


def test_long_series_are_thinned_but_keep_their_ends():
    points = [(float(i), float(i % 7)) for i in range(100_000)]
    drawing = str(charts.svg(Chart("t", "u", [Series("a", points)])))
    assert len(points_of(drawing, "line s0")) == charts.MAX_POINTS
    assert len(drawing) < 20_000


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 123.0), (-3.0, 4.0), (0.0021, 0.0034), (0.0, 6e-6)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 8
    slack = (high - low) * 1e-6
    assert all(low - slack <= value <= high + slack for value in found)
    digits = [f"{value:.6e}".split("e")[0].rstrip("0").rstrip(".") for value in found]
    assert all(len(text.replace("-", "")) <= 4 for text in digits)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05234, "0.0523"), (12.0, "12"), (1234.0, "1,234"), (12345.0, "12.3k"), (2.5e6, "2.5M")],
)
def test_numbers_are_short(value: float, text: str):
    assert charts.number(value) == text
