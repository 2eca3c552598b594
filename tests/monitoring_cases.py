"""What the dashboard and the alert rules ask of Prometheus, and whether a scrape can answer it."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

MONITORING = Path(__file__).parents[1] / "deploy" / "monitoring"
DASHBOARD = MONITORING / "hone.json"
ALERTS = MONITORING / "alerts.yml"
ALERT_TESTS = MONITORING / "alerts_test.yml"
READY_S = 60.0  # for a server to start, or to end, on cores that others use, too
Selector = Any


def panels() -> list[tuple[str, str, str]]:
    """(row, panel, expression) of every query of the dashboard, for all runs."""
    found: list[tuple[str, str, str]] = []
    row = ""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        queries = [target["expr"].replace("$run", ".*") for target in panel["targets"]]
        found += [(row, panel["title"], query) for query in queries]
    return found


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def selectors(expression: str) -> list[Selector]:
    """Every series selector of a PromQL expression."""
    found: list[Selector] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def check_serve_row(exporter: str, within_s: float) -> None:
    """Every query of the dashboard and of the alerts on the endpoint finds a series at the URL of
    the exporter.
    """
    wanted = [query for row, _, query in panels() if row == "Serve"]
    wanted += [rule["expr"] for rule in alert_rules() if "ray_hone_endpoint" in rule["expr"]]
    assert len(wanted) == 5
    deadline = time.monotonic() + within_s
    while True:
        scrape = Scrape(httpx.get(exporter, timeout=10).text)
        missing = [selector for query in wanted for selector in scrape.unanswered(query)]
        if not missing:
            return
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)


class Scrape:
    """Samples of one or more exporters, as Prometheus would have them."""

    def __init__(self, *texts: str) -> None:
        self.samples = [
            (sample.name, sample.labels)
            for text in texts
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def answers(self, selector: Selector) -> bool:
        """Whether at least one series matches."""
        return any(self._matches(selector, name, labels) for name, labels in self.samples)

    def unanswered(self, expression: str) -> list[str]:
        return [s.prettify() for s in selectors(expression) if not self.answers(s)]

    @staticmethod
    def _matches(selector: Selector, name: str, labels: dict[str, str]) -> bool:
        if selector.name is not None and selector.name != name:
            return False
        for matcher in selector.matchers.matchers:
            value = name if matcher.name == "__name__" else labels.get(matcher.name, "")
            is_regex = matcher.op in (promql_parser.MatchOp.Re, promql_parser.MatchOp.NotRe)
            is_equal = (
                bool(re.fullmatch(matcher.value, value)) if is_regex else value == matcher.value
            )
            wants = matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.Re)
            if is_equal is not wants:
                return False
        return True


class Prometheus:
    """A running server, asked through its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[Any]:
        reply = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=30)
        reply.raise_for_status()
        return reply.json()["data"]["result"]

    def rules(self) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self._url}/api/v1/rules", timeout=30)
        reply.raise_for_status()
        return [rule for group in reply.json()["data"]["groups"] for rule in group["rules"]]


@contextmanager
def prometheus(place: Path, exporters: list[str]) -> Iterator[Prometheus]:
    """The `prometheus` of PATH with our rules, scraping `exporters` every few seconds: as long may
    an exporter take that shares two cores with a run.
    """
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "5s", "evaluation_interval": "5s"}
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"] = [
        {"job_name": "ray", "static_configs": [{"targets": exporters}]},
    ]
    (place / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    log = place / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={place}/prometheus.yml",
             f"--storage.tsdb.path={place}/data", f"--web.listen-address={address}"],
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                if httpx.get(f"http://{address}/-/ready", timeout=2).is_success:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, f"prometheus ended at start\n{log.read_text()}"
            assert time.monotonic() < deadline, f"prometheus is not ready\n{log.read_text()}"
            time.sleep(0.2)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(READY_S)
