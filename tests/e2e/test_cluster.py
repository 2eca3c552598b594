"""One short run on three real Ray nodes through `hone submit`: placement, doors, node loss."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster_cases import (
    HONE,
    LABELS,
    QUICKSTART,
    ROOT,
    ThreeNodes,
    rows,
    submit,
    three_nodes,
    wait_for,
)  # fmt: skip
from tests.doors import doors
from tests.monitoring_cases import Scrape, alert_rules, panels, prometheus

pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]


class LiveRun:
    """A run that trains on the cluster while the tests look at it."""

    def __init__(self, nodes: ThreeNodes, path: Path, job: subprocess.Popen[bytes]) -> None:
        self.nodes, self.path, self.job = nodes, path, job

    @property
    def step(self) -> int:
        return max((row["step"] for row in rows(self.path / "metrics.jsonl")), default=-1)

    def kinds(self) -> list[str]:
        return [row["kind"] for row in rows(self.path / "events.jsonl")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    place = tmp_path_factory.mktemp("cluster")
    with three_nodes(place) as nodes:
        job = submit(nodes, place / "runs", "run.steps=100000")
        try:
            run = LiveRun(nodes, place / "runs" / "demo", job)
            wait_for(lambda: run.step >= 1 or job.poll() is not None, "a first step", 600)
            assert job.poll() is None, (place / "runs" / "submit.log").read_text()
            yield run
        finally:
            job.kill()


def test_each_role_runs_on_its_node(live: LiveRun) -> None:
    pools = {node["node_id"]: node["labels"]["pool"] for node in live.nodes.state("nodes")}
    alive = [actor for actor in live.nodes.state("actors") if actor["state"] == "ALIVE"]
    ours = [actor for actor in alive if (actor["name"] or "").startswith("hone/")]
    places = {actor["name"].split("/")[2]: pools[actor["node_id"]] for actor in ours}
    assert places == {
        "controller": "learner", "learner": "learner", "rollout": "rollout", "reward": "reward",
    }  # fmt: skip


def test_a_run_that_can_never_fit_is_refused_from_outside(live: LiveRun) -> None:
    """`hone check` joins through the Ray client, says what is missing, and leaves."""
    done = subprocess.run(
        [HONE, "check", QUICKSTART, "--address", f"ray://127.0.0.1:{live.nodes.client_port}",
         "resources.accelerator=cpu", LABELS, "rollout.workers=3", f"run.dir={live.path.parent}"],
        cwd=ROOT, env=live.nodes.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rollout needs 3 x 1 CPU on pool=rollout; 1 fit on 1 matching node" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_door_opens_without_the_token(
    live: LiveRun, record_property: Callable[[str, float], None]
) -> None:
    """All but Ray's metrics exporters, which know no token and hand out numbers only."""
    found = doors([*live.nodes.pids, live.nodes.redis_pid])
    listing = "\n".join(f"{d.address}:{d.port} {d.process}: {d.outcome}, {d.answer}" for d in found)
    print(listing)
    counts = Counter(door.outcome for door in found)
    for outcome in ("refused", "metrics", "silent", "open"):
        record_property(f"ports_{outcome}", counts[outcome])
    record_property("ports_beyond_loopback", sum(not door.is_local for door in found))
    assert counts["refused"] >= 10, listing
    assert not counts["open"], listing
    assert counts["metrics"] <= 2 * len(live.nodes.nodes), listing


def test_no_panel_and_no_alert_of_a_training_run_lacks_data(live: LiveRun) -> None:
    """Scraped from the exporters of all three nodes, as Prometheus would."""
    wanted = [(f"{row}: {panel}", query) for row, panel, query in panels() if row != "Serve"]
    wanted += [
        (rule["alert"], rule["expr"])
        for rule in alert_rules()
        if "ray_hone_endpoint" not in rule["expr"]
    ]
    missing: list[str] = []

    def is_answered() -> bool:
        scrape = Scrape(*[httpx.get(url, timeout=10).text for url in live.nodes.exporters])
        missing[:] = [f"{name}: {s}" for name, query in wanted for s in scrape.unanswered(query)]
        return not missing

    try:
        wait_for(is_answered, "data for every panel and alert", 60)
    finally:
        print("\n".join(missing))


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian: the package prometheus")
def test_a_real_prometheus_answers_every_panel_and_evaluates_every_rule(
    live: LiveRun, tmp_path: Path
) -> None:
    exporters = [url.split("/")[2] for url in live.nodes.exporters]
    with prometheus(tmp_path, exporters) as server:
        queries = [query for row, _, query in panels() if row != "Serve"]
        wait_for(lambda: all(server.query(q) for q in queries), "an answer to every panel", 60)
        rules = server.rules()
        assert {rule["name"] for rule in rules} == {rule["alert"] for rule in alert_rules()}
        wait_for(lambda: all(r["health"] == "ok" for r in server.rules()), "healthy rules", 30)
        firing = {rule["name"] for rule in server.rules() if rule["state"] == "firing"}
        assert not firing, firing


def test_a_lost_rollout_node_is_replaced_by_one_that_joins(
    live: LiveRun, record_property: Callable[[str, float], None]
) -> None:
    before = live.step
    live.nodes.rollout_node.kill()
    noticed_s = wait_for(lambda: "worker_died" in live.kinds(), "the loss to be noticed", 60)
    live.nodes.rollout_node = live.nodes.add("rollout")
    restarted_s = wait_for(lambda: "worker_restarted" in live.kinds(), "a new engine", 150)
    lost_at = live.step
    wait_for(lambda: live.step > lost_at, "the next step", 60)
    record_property("seconds_to_notice", noticed_s)
    record_property("seconds_to_recover_after_joining", restarted_s)
    assert live.job.poll() is None
    assert live.step > before
    ledger = rows(live.path / "ledger.jsonl")
    used = [group for record in ledger for group in record["group_ids"]]
    assert len(used) == len(set(used))
    assert [record["step"] for record in ledger] == list(range(1, len(ledger) + 1))
