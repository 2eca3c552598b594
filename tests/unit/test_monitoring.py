"""What lies in deploy/monitoring: the dashboard and the alert rules ask for what a run exports."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from cluster.metrics import prometheus_name
from tests.monitoring_cases import (
    ALERT_TESTS,
    ALERTS,
    DASHBOARD,
    MONITORING,
    alert_rules,
    panels,
    selectors,
)

ROOT = Path(__file__).parents[2]
MAKERS = ("actors", "learners")


def exported() -> set[str]:
    """Names of all series, read from the code that makes them: live gauges, rows of a step, the
    endpoint's own. Ray puts `ray_` before them; counters end in `_total`, histograms in `_bucket`.
    """
    code = {p: p.read_text() for folder in MAKERS for p in (ROOT / folder).glob("*.py")}
    rows = {key for text in code.values() for key in re.findall(r'"([a-z_]+/[a-z_@]+)"', text)}
    live = re.findall(r'_gauge\("(\w+)"', code[ROOT / "actors" / "live_gauges.py"])
    endpoint = re.findall(r'"(hone_endpoint_\w+)"', (ROOT / "serve" / "traffic.py").read_text())
    plain = {prometheus_name(key) for key in (*rows, "policy_version", "step")}
    plain |= {f"hone_{name}" for name in live} | set(endpoint)
    return {f"ray_{name}{end}" for name in plain for end in ("", "_total", "_bucket")}


def test_every_row_of_the_dashboard_is_there_and_parses() -> None:
    rows = [p["title"] for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] == "row"]
    assert rows == ["Rollouts", "Rewards", "Buffer", "Learner", "Sync", "Serve"]
    assert len({(row, title) for row, title, _ in panels()}) == 24
    for _, _, expression in panels():
        promql_parser.parse(expression)
        assert selectors(expression)


def test_panels_and_alerts_name_series_that_exist() -> None:
    known = exported()
    asked = [(title, query) for _, title, query in panels()]
    asked += [(rule["alert"], rule["expr"]) for rule in alert_rules()]
    unknown = {
        f"{title}: {selector.name}"
        for title, query in asked
        for selector in selectors(query)
        if selector.name is not None and selector.name not in known
    }
    assert len(known) > 50
    assert not unknown


def test_each_alert_says_what_to_do_and_has_series_that_fire_it() -> None:
    """The series are for `promtool test rules`; an alert without some may be one that never can."""
    cases = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    fired = {
        sample["labels"]
        for case in cases
        for query in case["promql_expr_test"]
        for sample in query["exp_samples"]
    }
    assert fired == {f'{{alertname="{rule["alert"]}"}}' for rule in alert_rules()}
    asked = {s.name for rule in alert_rules() for s in selectors(rule["expr"])}
    fed = {
        s.name for case in cases for row in case["input_series"] for s in selectors(row["series"])
    }
    assert fed == asked
    for rule in alert_rules():
        assert rule["annotations"]["action"]


def test_the_pod_monitor_finds_the_exporter_of_every_ray_pod() -> None:
    """By a label and the name of a port; one that is missed is missed without a word."""
    kuberay = ROOT / "deploy" / "kuberay"
    monitor = yaml.safe_load((kuberay / "monitoring.yaml").read_text())["spec"]
    [endpoint] = monitor["podMetricsEndpoints"]
    templates = [
        group["template"]
        for name in ("raycluster.yaml", "rayservice.yaml")
        for spec in [yaml.safe_load((kuberay / name).read_text())["spec"]]
        for cluster in [spec.get("rayClusterConfig", spec)]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    ]
    assert len(templates) == 6
    for template in templates:
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ports = template["spec"]["containers"][0]["ports"]
        assert {"name": endpoint["port"], "containerPort": 8080} in ports


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", ALERTS.name],
        ["check", "config", "--syntax-only", "prometheus.yml"],
        ["test", "rules", ALERT_TESTS.name],
    ],
    ids=["rules", "config", "synthetic series"],
)
def test_prometheus_own_checker_accepts_the_rules(arguments: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH: scripts/prometheus fetches it")
    done = subprocess.run(
        [promtool, *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
