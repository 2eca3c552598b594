"""Release decisions on disk, the canary's exact share, and the guards' evidence."""

from pathlib import Path
from typing import Any

import pytest

from serve.guards import GuardSettings, Outcome, Outcomes, eval_drop
from serve.release import Release


@pytest.fixture
def events() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture
def release(tmp_path: Path, events: list) -> Release:
    return Release(tmp_path, lambda kind, **fields: events.append((kind, fields)))


def test_a_canary_gets_its_share_of_5000_requests(release: Release) -> None:
    release.note_stable(1)
    assert not any(release.is_canary_turn() for _ in range(100))
    release.start_canary(2, 0.1, author="a")
    turns = [release.is_canary_turn() for _ in range(5000)]
    assert sum(turns) == 500
    assert all(sum(turns[i : i + 100]) == 10 for i in range(0, 5000, 100))


def test_decisions_are_kept_and_told(release: Release, events: list, tmp_path: Path) -> None:
    release.note_stable(1)
    release.note_stable(2)
    release.start_canary(3, 0.5, author="ann")
    release.promote(3, author="ann")
    release.roll_back(3, 2, reason="bad", author="guard")
    again = Release(tmp_path, lambda *_, **__: None).state
    assert again == release.state
    assert (again.stable, again.canary, again.refused) == (2, None, [3])
    assert again.history == [1]
    assert not again.is_following
    assert [kind for kind, _ in events] == [
        "release_canary", "release_promoted", "release_rolled_back",
    ]  # fmt: skip
    assert events[-1][1] == {"version": 3, "to": 2, "reason": "bad", "author": "guard"}


def test_a_rolled_back_canary_leaves_stable_alone(release: Release) -> None:
    release.note_stable(5)
    release.start_canary(6, 0.1, author="a")
    release.roll_back(6, 5, reason="slow", author="guard")
    state = release.state
    assert (state.stable, state.canary, state.canary_share) == (5, None, 0.0)
    release.start_canary(6, 0.1, author="a")
    assert release.state.refused == []


def test_a_change_by_another_process_is_seen(release: Release, tmp_path: Path) -> None:
    release.note_stable(1)
    Release(tmp_path, lambda *_, **__: None).promote(4, author="b")
    assert release.state.stable == 4


SETTINGS = GuardSettings(window_s=10, min_requests=20, max_error_rate=0.1, max_latency_ratio=2)


def fill(outcomes: Outcomes, version: int, n: int, errors: int, token_s: float, at: float) -> None:
    for i in range(n):
        outcomes.add(version, Outcome(at, i < errors, token_s))


def test_errors_and_latency_condemn_only_with_evidence() -> None:
    outcomes = Outcomes(SETTINGS)
    fill(outcomes, 1, 30, 0, 0.01, 100.0)
    fill(outcomes, 2, 19, 19, 0.01, 100.0)
    assert outcomes.complaint(2, 1, 101.0) == ""
    fill(outcomes, 2, 1, 0, 0.01, 100.0)
    assert "error rate 95.0%" in outcomes.complaint(2, 1, 101.0)
    assert outcomes.complaint(2, 1, 111.0) == ""
    fill(outcomes, 3, 30, 3, 0.019, 100.0)
    assert outcomes.complaint(3, 1, 101.0) == ""
    fill(outcomes, 4, 30, 0, 0.03, 100.0)
    assert "3.0 times the latency" in outcomes.complaint(4, 1, 101.0)
    assert outcomes.complaint(1, 1, 101.0) == ""


def rows(evals: dict[int, float]) -> list[dict[str, float]]:
    return [{"step": v, "policy_version": v, "eval/pass@1": e} for v, e in evals.items()]


@pytest.mark.parametrize(
    ("evals", "served", "blamed"),
    [
        ({1: 0.5, 5: 0.3}, 5, 5),
        ({1: 0.5, 5: 0.45}, 5, None),
        ({1: 0.5, 5: 0.3}, 4, None),
        ({1: 0.5, 5: 0.3}, 7, 5),
        ({5: 0.3}, 5, None),
        ({1: 0.2, 3: 0.6, 5: 0.45, 9: 0.0}, 6, 5),
        ({1: 0.5, 5: float("nan")}, 5, None),
    ],
)
def test_an_eval_drop_blames_the_newest_evaluated_version(
    evals: dict[int, float], served: int, blamed: int | None
) -> None:
    drop = eval_drop(rows(evals), served, GuardSettings(max_eval_drop=0.1))
    assert (drop.blamed if drop and drop.reason else None) == blamed
