"""One short run on three real Ray nodes through `hone submit`: placement, doors, node loss, end.

A figure is recorded when what it stands for has held: rows of `make show` are judged by them.
"""

import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cluster import ray_token
from cluster.resume import saved_state
from tests.cluster_cases import (
    HONE,
    LABELS,
    QUICKSTART,
    RAY,
    ROOT,
    STEP_S,
    SubmittedRun,
    three_nodes,
    wait_for,
)
from tests.doors import doors
from tests.monitoring_cases import Scrape, alert_rules, panels, prometheus

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
NOTICE_S = 60.0
REPLACE_S = 300.0  # a node joins and an engine loads
Record = Callable[[str, float], None]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubmittedRun]:
    place = tmp_path_factory.mktemp("cluster")
    with three_nodes(place) as nodes:
        run = SubmittedRun(nodes, place / "runs", "run.steps=100000")
        try:
            run.wait_for(lambda: run.step >= 1, "first step", STEP_S)
            yield run
        finally:
            run.close()


def test_each_role_runs_on_its_node(live: SubmittedRun, record_property: Record) -> None:
    pools = {node["node_id"]: node["labels"]["pool"] for node in live.nodes.state("nodes")}
    alive = [actor for actor in live.nodes.state("actors") if actor["state"] == "ALIVE"]
    ours = [actor for actor in alive if (actor["name"] or "").startswith("hone/")]
    places = sorted((actor["name"].split("/")[2], pools[actor["node_id"]]) for actor in ours)
    if any("/standby/" in actor["name"] for actor in ours):  # where there is memory to spare
        places.remove(("rollout", "rollout"))
    assert places == [
        ("controller", "learner"), ("learner", "learner"), ("reward", "reward"),
        ("rollout", "rollout"),
    ]  # fmt: skip
    record_property("roles_on_their_nodes", len(places))


def test_a_run_that_can_never_fit_is_refused_from_outside(
    live: SubmittedRun, record_property: Record
) -> None:
    """`hone check` joins through the Ray client, says what is missing, and leaves."""
    done = subprocess.run(
        [HONE, "check", QUICKSTART, "--address", f"ray://127.0.0.1:{live.nodes.client_port}",
         "resources.accelerator=cpu", LABELS, "rollout.workers=3", f"run.dir={live.dir.path}"],
        cwd=ROOT, env=live.nodes.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rollout needs 3 x 1 CPU on pool=rollout; 1 fit on 1 matching node" in done.stderr
    assert "Traceback" not in done.stderr
    record_property("refusals_from_outside", 1)


def test_no_door_opens_without_the_token(live: SubmittedRun, record_property: Record) -> None:
    """All but Ray's metrics exporters, which know no token and hand out numbers only. What speaks
    no protocol that is known here (gloo, between the ranks of one process) is on loopback, not at
    the address of a node.
    """
    found = doors(live.nodes.pids)
    listing = "\n".join(map(str, found))
    print(listing)
    counts = Counter(door.outcome for door in found)
    assert counts["refused"] >= 10, listing
    assert [str(door) for door in found if door.is_weak] == []
    exporters = {int(url.split(":")[2].split("/")[0]) for url in live.nodes.exporters}
    assert exporters <= {door.port for door in found if door.outcome == "metrics"}, listing
    assert counts["metrics"] <= 2 * len(live.nodes.nodes), listing
    for outcome in ("refused", "metrics", "silent", "open"):
        record_property(f"ports_{outcome}", counts[outcome])


def test_exporters_give_no_secret_away(live: SubmittedRun, record_property: Record) -> None:
    environment = live.nodes.environment
    password = environment["HONE_BUFFER_URL"].split("@")[0].rpartition(":")[2]
    for url in live.nodes.exporters:
        text = httpx.get(url, timeout=30).text
        assert Path(environment[ray_token.TOKEN_PATH]).read_text() not in text
        assert len(password) > 8
        assert password not in text
    record_property("exporters_without_secrets", len(live.nodes.exporters))


def test_no_panel_and_no_alert_of_a_training_run_lacks_data(
    live: SubmittedRun, record_property: Record
) -> None:
    """Scraped from the exporters of all three nodes, as Prometheus would."""
    wanted = [(f"{row}: {panel}", query) for row, panel, query in panels() if row != "Serve"]
    wanted += [
        (rule["alert"], rule["expr"])
        for rule in alert_rules()
        if "ray_hone_endpoint" not in rule["expr"]
    ]
    missing: list[str] = ["not scraped yet"]

    def is_answered() -> bool:
        try:
            texts = [httpx.get(url, timeout=30).text for url in live.nodes.exporters]
        except httpx.HTTPError as error:
            missing[:] = [repr(error)]
            return False
        scrape = Scrape(*texts)
        missing[:] = [f"{name}: {s}" for name, query in wanted for s in scrape.unanswered(query)]
        return not missing

    def story() -> str:
        return "\n".join([*missing, live.story()])

    wait_for(is_answered, "data for every panel and alert", 120, story)
    record_property("queries_with_data", len(wanted))


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="see scripts/prometheus")
def test_a_real_prometheus_answers_every_panel_and_evaluates_every_rule(
    live: SubmittedRun, tmp_path: Path, record_property: Record
) -> None:
    exporters = [url.split("/")[2] for url in live.nodes.exporters]
    with prometheus(tmp_path, exporters) as server:
        queries = [query for row, _, query in panels() if row != "Serve"]

        def unanswered() -> str:
            return "\n".join(query for query in queries if not server.query(query))

        wait_for(lambda: not unanswered(), "answer to every panel", 120, unanswered)
        rules = server.rules()
        assert {rule["name"] for rule in rules} == {rule["alert"] for rule in alert_rules()}
        wait_for(
            lambda: all(rule["health"] == "ok" for rule in server.rules()),
            "health of every rule", 60, lambda: str(server.rules()),
        )  # fmt: skip
        firing = {rule["name"] for rule in server.rules() if rule["state"] == "firing"}
        assert not firing, firing
        record_property("rules_evaluated", len(rules))


def test_a_lost_rollout_node_is_replaced_by_one_that_joins(
    live: SubmittedRun, record_property: Record
) -> None:
    engine, before = "rollout/0", live.step
    num_died, num_restarted = (
        live.count("worker_died", engine),
        live.count("worker_restarted", engine),
    )
    live.nodes.rollout_node.kill()
    noticed_s = live.wait_for(
        lambda: live.count("worker_died", engine) > num_died, "notice of the lost node", NOTICE_S
    )
    live.nodes.rollout_node = live.nodes.add("rollout")
    restarted_s = live.wait_for(
        lambda: live.count("worker_restarted", engine) > num_restarted, "new engine", REPLACE_S
    )
    lost_at = live.step
    live.wait_for(lambda: live.step > lost_at, "step after the loss", NOTICE_S)
    assert live.step > before
    ledger = live.ledger
    used = [group for record in ledger for group in record["group_ids"]]
    assert len(used) == len(set(used))
    assert [record["step"] for record in ledger] == list(range(1, len(ledger) + 1))
    record_property("seconds_to_notice", noticed_s)
    record_property("seconds_to_recover_after_joining", restarted_s)


def test_a_stopped_job_saves_its_state(live: SubmittedRun, record_property: Record) -> None:
    """By the command that `hone submit` printed; last, because nothing runs afterwards."""
    [command] = re.findall(r"end it with: ray (job stop .+)", live.log.read_text())
    started = time.monotonic()
    done = subprocess.run(
        [RAY, *shlex.split(command)], env=live.nodes.environment, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stopped_s = time.monotonic() - started
    assert live.job.wait(60) == 130, live.story()
    assert saved_state(live.dir).startswith("state saved at step"), live.story()
    record_property("seconds_to_stop_with_state_saved", stopped_s)
