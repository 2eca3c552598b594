"""Release decisions on disk, the canary's exact share, and the guards' evidence."""

from pathlib import Path
from typing import Any

import pytest

from serve.guards import GuardSettings, Outcome, Outcomes, eval_drop, standing
from serve.release import Release, ReleaseConflictError


@pytest.fixture
def events() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture
def release(tmp_path: Path, events: list) -> Release:
    return Release(tmp_path, lambda kind, **fields: events.append((kind, fields)))


def canary(release: Release, version: int, share: float = 0.5) -> None:
    release.start_canary(version, share, seen=release.state, author="ann")


def roll_back(release: Release, bad: int, to: int, *, stamp: float = 0.0) -> None:
    release.roll_back(bad, to, seen=release.state, stamp=stamp, reason="bad", author="guard")


def test_a_canary_gets_its_share_of_5000_requests(release: Release) -> None:
    release.note_stable(1, 1.0)
    assert not any(release.is_canary_turn() for _ in range(100))
    canary(release, 2, 0.1)
    turns = [release.is_canary_turn() for _ in range(5000)]
    assert sum(turns) == 500
    assert all(sum(turns[i : i + 100]) == 10 for i in range(0, 5000, 100))


def test_decisions_are_kept_and_told(release: Release, events: list, tmp_path: Path) -> None:
    release.note_stable(1, 1.0)
    release.note_stable(2, 2.0)
    canary(release, 3)
    release.promote(3, seen=release.state, author="ann")
    roll_back(release, 3, 2)
    again = another(tmp_path).state
    assert again == release.state
    assert (again.stable, again.canary, again.refused) == (2, None, [3])
    assert again.history == [1]
    assert not again.is_following
    assert [kind for kind, _ in events] == [
        "release_canary", "release_promoted", "release_rolled_back",
    ]  # fmt: skip
    assert events[-1][1] == {"version": 3, "to": 2, "reason": "bad", "author": "guard"}


def test_a_rolled_back_canary_leaves_stable_alone(release: Release) -> None:
    release.note_stable(5, 5.0)
    canary(release, 6)
    roll_back(release, 6, 5)
    state = release.state
    assert (state.stable, state.canary, state.canary_share) == (5, None, 0.0)
    canary(release, 6)
    assert release.state.refused == []


def another(directory: Path) -> Release:
    """What another replica has open."""
    return Release(directory, lambda *_, **__: None)


def test_of_two_decisions_on_one_state_the_first_counts(
    release: Release, events: list, tmp_path: Path
) -> None:
    release.note_stable(1, 1.0)
    seen = release.state
    another(tmp_path).promote(4, seen=seen, author="b")
    assert release.state.stable == 4
    for decide in (
        lambda: release.promote(5, seen=seen, author="a"),
        lambda: release.start_canary(5, 0.1, seen=seen, author="a"),
        lambda: release.follow(seen=seen, author="a"),
        lambda: release.roll_back(1, 0, seen=seen, stamp=9.0, reason="bad", author="guard"),
    ):
        with pytest.raises(ReleaseConflictError, match="changed meanwhile"):
            decide()
    assert (release.state.stable, release.state.refused, events) == (4, [], [])


def test_a_replica_that_follows_undoes_no_promotion(release: Release, tmp_path: Path) -> None:
    """It was loading version 9 when another replica promoted version 4."""
    release.note_stable(8, 8.0)
    another(tmp_path).promote(4, seen=release.state, author="b")
    release.note_stable(9, 9.0)
    assert (release.state.stable, release.state.history) == (4, [8])
    release.follow(seen=release.state, author="a")
    release.note_stable(9, 9.0)
    assert (release.state.stable, release.state.history) == (9, [8, 4])


def test_a_slow_replica_does_not_move_stable_back(release: Release, tmp_path: Path) -> None:
    release.note_stable(6, 6.0)
    release.note_stable(7, 7.0)
    before = release.state
    slow = another(tmp_path)
    slow.note_stable(6, 6.0)
    assert release.state == before
    slow.note_stable(5, 8.0)  # the run went back, and published version 5 again
    assert (release.state.stable, release.state.history) == (5, [6, 7])
    slow.note_stable(3, 2.0, is_first=True)
    assert release.state.stable == 3


def test_a_note_of_following_is_no_decision(release: Release) -> None:
    release.note_stable(1, 1.0)
    seen = release.state
    release.note_stable(2, 2.0)
    release.promote(1, seen=seen, author="a")
    assert (release.state.stable, release.state.history) == (1, [2])


def test_a_file_is_refused_once(release: Release, events: list, tmp_path: Path) -> None:
    another(tmp_path).refuse(8, stamp=8.0, reason="NaN")
    release.refuse(8, stamp=8.0, reason="NaN")
    assert (release.state.refused, events) == ([8], [])


def test_a_number_is_refused_until_the_run_gives_it_to_other_weights(release: Release) -> None:
    release.refuse(8, stamp=80.0, reason="NaN")
    release.note_stable(10, 100.0)
    roll_back(release, 10, 7, stamp=100.0)
    release.note_reissue(10, 100.0)
    release.note_reissue(11, 110.0)
    assert release.state.refused == [8, 10]
    release.note_reissue(9, 120.0)  # resumed from step 8
    assert release.state.refused == [8]
    release.note_reissue(8, 130.0)
    assert release.state.refused == []


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


def test_versions_that_are_gone_take_no_memory() -> None:
    outcomes = Outcomes(SETTINGS)
    for version in range(100):
        fill(outcomes, version, 20, 20, 0.01, 100.0)
        outcomes.forget({version})
    assert list(outcomes._recent) == [99]


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


def test_steps_that_a_resumed_run_took_back_do_not_count() -> None:
    written = [
        {"step": 1, "eval/pass@1": 0.5},
        {"step": 2, "eval/pass@1": None, "lr": 1.0},
        {"step": 2, "eval/pass@1": 0.1},
        {"step": 3},
        {"step": 2, "lr": 2.0},
        {"lr": 3.0},
    ]
    assert standing(written[:4])[1:] == [{"step": 2, "eval/pass@1": 0.1, "lr": 1.0}, {"step": 3}]
    assert standing(written) == [{"step": 1, "eval/pass@1": 0.5}, {"step": 2, "lr": 2.0}]
    resumed = standing([*written[:4], {"step": 1, "eval/pass@1": 0.6}])
    assert resumed == [{"step": 1, "eval/pass@1": 0.6}]
