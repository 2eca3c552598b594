"""Figures of rewards: per verifier, of a shadow, and which versions are remembered."""

import msgspec
import pytest

from actors.producer import Production
from actors.reward_candidate import MAX_LATENCIES, Tally
from actors.reward_worker import GroupSummary, is_failed, summarize
from actors.statistics import RolloutStatistics
from cluster.errors import DeadlineError, HoneError
from cluster.reward_state import MAX_REMEMBERED, RewardState
from cluster.types import GUIDED, Task, TrajectoryStatus, Verdict
from rewards.base import COST, abstention
from rewards.self_check import group_of


def summary(scores: list[float | None], latency_s: float) -> GroupSummary:
    return GroupSummary(
        group_id="g", task_id="t", outcome="added", rewards=scores, passed=[None] * len(scores),
        signals={"judge": scores}, reward_versions={}, completion_tokens=[1] * len(scores),
        arms=["default"] * len(scores), num_truncated=0, is_uniform=False, min_policy_version=0,
        max_latency_s=latency_s, latency_s={"judge": latency_s},
        num_timed_out={"judge": scores.count(None)} if latency_s > 3 else {},
        cost={"judge": latency_s / 8},
    )  # fmt: skip


def test_each_verifier_has_its_latency_abstentions_and_timeouts():
    statistics = RolloutStatistics()
    statistics.add(Production(summary([1.0, None], 2.0)))
    statistics.add(Production(summary([None, None], 4.0)))
    metrics = statistics.drain()
    assert metrics["reward/judge/mean"] == 1.0
    assert metrics["reward/judge/abstain_fraction"] == 0.75
    assert metrics["reward/judge/timeout_fraction"] == 0.5
    assert metrics["reward/judge/latency_s"] == 3.0
    assert metrics["reward/judge/cost"] == 0.75


def test_the_cost_of_hinted_attempts_counts():
    statistics = RolloutStatistics()
    plain, hinted = summary([0.0, 0.0], 2.0), summary([1.0, 0.0], 4.0)
    statistics.add(Production(plain, hinted={1: hinted}))
    metrics = statistics.drain()
    assert metrics["reward/judge/mean"] == 0.0
    assert metrics["reward/judge/cost"] == 0.75


def test_rollouts_with_a_given_beginning_do_not_flatter_the_reward_curve():
    statistics = RolloutStatistics()
    group = msgspec.structs.replace(
        summary([0.0, 1.0, None, 1.0], 4.0),
        passed=[False, True, None, True],
        arms=["plain", "plain", GUIDED, GUIDED],
        begun_tokens=[0, 0, 4, 2],
    )
    statistics.add(Production(group, prefix_tokens=6))
    metrics = statistics.drain()
    assert metrics["reward/mean"] == metrics["reward/judge/mean"] == 0.5
    assert metrics["reward/pass_rate"] == 0.5
    assert metrics["reward/judge/abstain_fraction"] == 0.0
    assert metrics["reward/judge/timeout_fraction"] == 0.25
    assert metrics["guide/prefix_tokens"] == 3
    assert metrics["guide/prefixed_pass_rate"] == 1.0


def test_a_program_of_hinted_rollouts_alone_has_a_reward_curve_and_one_without_room_says_so():
    statistics = RolloutStatistics()
    hinted = msgspec.structs.replace(summary([0.0, 1.0], 4.0), arms=[GUIDED, GUIDED])
    statistics.add(Production(hinted))
    assert statistics.drain()["reward/mean"] == 0.5
    plain = msgspec.structs.replace(summary([0.0, 1.0], 4.0), begun_tokens=[0, 0])
    statistics.add(Production(plain, prefix_tokens=6))
    metrics = statistics.drain()
    assert metrics["guide/prefix_tokens"] == 0
    assert "guide/prefixed_pass_rate" not in metrics


def test_a_summary_counts_what_ran_out_of_time_and_what_was_paid():
    late = abstention(DeadlineError("judge", "too slow"))
    broken = abstention(HoneError("no verdict"))
    task = Task(task_id="t", taskset="x", messages=[])
    group = group_of(task, ["a", "b", "c", "d"])
    verdicts = [late, broken, *(Verdict(score=1.0, breakdown={COST: c}) for c in (0.5, 0.25))]
    scored = msgspec.structs.replace(
        group,
        trajectories=[
            msgspec.structs.replace(t, verdicts=[msgspec.structs.replace(v, name="judge")])
            for t, v in zip(group.trajectories, verdicts, strict=True)
        ],
    )
    found = summarize(scored, "added")
    assert found.num_timed_out == {"judge": 1}
    assert found.cost == {"judge": 0.75}


def test_a_rollout_that_was_given_up_has_failed_and_an_abstained_one_has_not():
    group = group_of(Task(task_id="t", taskset="x", messages=[]), ["a", "b", "c"])
    verdicts = [Verdict(score=1.0), Verdict(score=0.0), Verdict(score=None)]
    passed, wrong, unknown = (
        msgspec.structs.replace(trajectory, verdicts=[verdict])
        for trajectory, verdict in zip(group.trajectories, verdicts, strict=True)
    )
    rejected = msgspec.structs.replace(unknown, status=TrajectoryStatus.ERROR)
    assert [is_failed(t) for t in (passed, wrong, unknown, rejected)] == [False, True, False, True]


def test_a_long_shadow_is_compared_in_bounded_memory():
    tally = Tally()
    for i in range(2 * MAX_LATENCIES):
        tally.add([1.0, None], 1.0, [0.5, 0.0], 2.0, float(i >= MAX_LATENCIES))
    tally.num_timeouts = 3
    report = tally.result()
    assert len(tally._latencies) == MAX_LATENCIES
    assert (report.num_trajectories, report.num_timeouts) == (2 * MAX_LATENCIES, 3)
    assert (report.mean_reward, report.mean_reward_live) == (0.5, 1.0)
    assert report.mean_difference == pytest.approx(0.5)
    assert report.latency_p50_s == 1.0


def test_the_live_version_and_the_one_before_are_never_forgotten():
    state = RewardState(origin={})
    for content in ("first", "second"):
        state, version = state.register(content, {}, {})
        state = state.activate(version.label)
    for i in range(2 * MAX_REMEMBERED):
        state, _ = state.register(f"shadow {i}", {}, {})
    assert state.get(state.active)
    assert state.get(state.previous)
    assert len(state.versions) <= MAX_REMEMBERED + 2
