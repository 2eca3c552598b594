"""How the chaos run hurts, when it takes a run for recovered, and what it judges."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import chaos, recovery
from benchmarks.chaos import KINDS, Commits, LiveRun, Recovery
from cluster import ledger as ledger_module
from cluster.ledger import Ledger
from cluster.types import StepRecord


def commit(ledger: Ledger, *steps: int) -> None:
    for step in steps:
        ledger.commit(
            StepRecord(
                step=step, policy_version=step, group_ids=[f"g{step}"],
                policy_versions=[step - 1], reward_versions={}, num_loss_tokens=1,
            )
        )  # fmt: skip


def test_a_roll_back_is_no_commit_while_it_happens_or_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    commit(ledger, 1, 2, 3, 4)
    commits = Commits(path)
    commit(ledger, 5)
    assert commits.count() == 1
    seen: list[int] = []
    replace = ledger_module._replace

    def seen_half_done(place: Path, data: bytes) -> None:
        seen.append(commits.count())
        replace(place, data)

    monkeypatch.setattr(ledger_module, "_replace", seen_half_done)
    ledger.truncate_after(2)
    assert seen == [1], "rolled-back steps are in both files"
    assert commits.count() == 1
    commit(ledger, 3, 4)
    assert commits.count() == 3


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LiveRun:
    monkeypatch.setattr(chaos, "COMING_UP_S", 0.0)
    run = LiveRun(tmp_path, "hurt", [])
    run.run.path.mkdir(parents=True)
    run.output.touch()
    return run


Start = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(run: LiveRun) -> Iterator[Start]:
    """Processes of the run with a title of their own."""
    started: list[subprocess.Popen[bytes]] = []

    def start(title: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([title, "60"], executable="sleep", start_new_session=True)
        started.append(process)
        run._sessions.add(process.pid)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_worker_that_stood_by_and_its_successor_both_die_as_a_worker_comes_up(
    run: LiveRun, start: Start
) -> None:
    promoted = start("ray::RolloutWorker.start")
    known = run._titled("rollout")
    fresh, rank = start("ray::RolloutWorker.prepare"), start("ray::LearnerRank")
    run._kill_newcomer("rollout", known)
    assert (promoted.wait(5), fresh.wait(5), rank.poll()) == (-9, -9, None)


def test_of_other_kinds_the_newcomer_dies(run: LiveRun, start: Start) -> None:
    old = start("ray::RewardWorker")
    known = run._titled("reward")
    new = start("ray::RewardWorker")
    run._kill_newcomer("reward", known)
    assert (old.poll(), new.wait(5)) == (None, -9)


def test_a_second_harm_that_nobody_misses_is_no_recovery(
    monkeypatch: pytest.MonkeyPatch, run: LiveRun, start: Start
) -> None:
    monkeypatch.setattr(chaos, "RECOVERY_S", 0.5)
    monkeypatch.setattr(chaos, "NOTICE_S", 0.0)
    monkeypatch.setattr(run, "_is_replaced", lambda *_: True)
    monkeypatch.setattr(Commits, "count", lambda _: 2)
    harmed = [start("ray::Controller") for _ in range(2)]
    monkeypatch.setattr(run, "_victim", lambda _: harmed.pop().pid)

    tries: list[int] = []

    def kill(noticed_at: int) -> set[int]:
        """The first harm is noticed, the second at its `noticed_at`th try."""
        tries.append(0)
        if len(tries) in (1, noticed_at):
            run.run.append_event("worker_died")
        return set()

    monkeypatch.setattr(run, "_kill_newcomer", lambda *_: kill(noticed_at=0))
    with pytest.raises(TimeoutError, match="no rollout that came up was missed"):
        run.hurt("controller", then="rollout")
    tries.clear()
    monkeypatch.setattr(run, "_kill_newcomer", lambda *_: kill(noticed_at=3))
    assert run.hurt("controller", then="rollout").kind == "controller>rollout"
    assert len(tries) == 3


def recoveries(*kinds: str, replaced_s: float = 1.0, working_s: float = 1.0) -> list[Recovery]:
    return [Recovery(kind, replaced_s, working_s) for kind in kinds]


TOGETHER = ("redis+reward", "learner>learner")


def test_the_next_to_be_hurt_is_one_of_those_hurt_least_by_themselves() -> None:
    assert recovery.least_hurt([]) == list(KINDS)
    once = recoveries(*KINDS, "redis+learner", "controller>learner")
    assert recovery.least_hurt(once) == list(KINDS)
    twice = recoveries(*KINDS, *(kind for kind in KINDS if kind != "reward_hang"))
    assert recovery.least_hurt(twice) == ["reward_hang"]


def test_a_kind_that_was_only_hurt_beside_others_was_never_hurt() -> None:
    found = recoveries(*(kind for kind in KINDS if kind != "reward"), *TOGETHER)
    assert recovery.missing(found) == ["reward"]
    assert recovery.recovery_table(found).verdict == "falls short"
    assert recovery.recovery_table(recoveries(*KINDS, *TOGETHER)).verdict == "holds"


def test_a_run_goes_through_two_at_once_and_each_that_comes_up() -> None:
    found = recoveries(*KINDS)
    assert recovery.missing(found) == [recovery.TWO_AT_ONCE, recovery.COMING_UP]
    assert recovery.recovery_table(found).verdict == "falls short"
    kinds, then = recovery.next_harm(found)
    assert (len(kinds), then) == (2, "")
    found += recoveries("+".join(kinds))
    seen: set[tuple[str, str]] = set()
    while len(seen) < len(recovery.AGAIN):
        (first, *others), then = recovery.next_harm(found)
        if not others and then:
            seen.add((first, then))
            found += recoveries(f"{first}>{then}")
    assert seen == set(recovery.AGAIN)
    assert recovery.missing(found) == []


def test_a_step_without_the_lost_worker_is_no_recovery_yet() -> None:
    rest = recoveries(*(kind for kind in KINDS if kind != "rollout"), *TOGETHER)
    late = recovery.recovery_table([*rest, Recovery("rollout", 16.0, 2.0)])
    assert (late.verdict, "late: ['rollout']" in late.why) == ("falls short", True)
    back = recovery.recovery_table([*rest, Recovery("rollout", 14.0, 2.0)])
    assert back.verdict == "holds"
