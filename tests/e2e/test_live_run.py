"""A run that trains, queried and changed from outside: `hone train` with `hone serve` beside it.

One run serves the module (engines take half a minute to load), so the tests are one story in
order: query, follow, swap from the page, roll back from the terminal, end.
"""

import json
from collections.abc import Iterator

import pytest

from benchmarks.endpoint_load import free_port
from benchmarks.endpoint_traffic import send
from tests import browser
from tests.live_run import LiveRun, live_run

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]  # rows of `make show AREA=serve`


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    with live_run(tmp_path_factory.mktemp("live"), free_port()) as live:
        yield live


def test_the_readme_script_asks_the_policy_that_trains(live: LiveRun) -> None:
    assert live.ask_as_the_readme_says().startswith("policy@")
    assert live.train.poll() is None
    waited = (live.folder / "serve.log").read_text()
    assert "waiting for its first weights" in waited


def test_requests_live_through_the_syncs_of_the_run(live: LiveRun) -> None:
    """None fails, none is cut, and the endpoint follows what the run publishes."""
    first = live.published_version()
    traffic = send(
        live.url, live.query, 60, clients=8, is_enough=lambda: live.published_version() >= first + 4
    )
    assert traffic.is_whole, (str(traffic), traffic.failures[:3])
    assert len(traffic.versions) >= 3, str(traffic)
    newest = live.published_version()
    assert newest >= first + 4
    live.until(lambda: _version(live) >= newest, 30)


def test_a_swap_from_the_page_takes_effect_in_the_run(live: LiveRun) -> None:
    """From the terminal where there is no Chromium, so that what follows can be tested there."""
    if browser.chromium() is None:
        live.hone("rewards", "swap", "demo", "correct.weight=0.5")
    else:
        live.swap_from_the_page("correct.weight=0.5")
    live.until(lambda: "2-" in live.rubrics(), 60)


def test_a_rollback_from_the_terminal_takes_effect(live: LiveRun) -> None:
    before = len(live.lines("ledger.jsonl"))
    live.hone("rewards", "rollback", "demo")
    live.until(lambda: len(live.lines("ledger.jsonl")) >= before + 3, 60)
    swaps = [event for event in live.lines("events.jsonl") if event["kind"] == "reward_swapped"]
    assert [event["action"] for event in swaps] == ["swap", "rollback"]


def test_the_run_ends_and_the_endpoint_goes_on(live: LiveRun) -> None:
    assert live.interrupt() == 130, (live.folder / "train.log").read_text()
    used = [group for row in live.lines("ledger.jsonl") for group in row["group_ids"]]  # type: ignore[attr-defined]
    assert len(used) == len(set(used))
    state = json.loads(sorted(live.run.path.glob("checkpoints/step_*/state.json"))[-1].read_text())
    assert state["reward_versions"]["rubric"].startswith("1-")
    assert live.ask_as_the_readme_says().startswith(f"policy@{state['policy_version']} ")


def _version(live: LiveRun) -> int:
    return max(send(live.url, live.query, 1, clients=1, tokens=1).versions)
