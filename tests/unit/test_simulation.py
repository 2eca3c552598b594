"""The simulated run against closed forms, and its order of intake against that of a run."""

import random

import msgspec
import pytest

from actors import intake as real
from actors.curriculum import Curriculum
from actors.rollout import Sampling
from cluster.errors import ConfigError
from cluster.group_log import Fate, GroupLine
from cluster.run_dir import JsonLines, RunDir
from cluster.simulated_engine import Group
from cluster.simulated_intake import intake_of
from cluster.simulation import Forecast, Layout, simulate
from cluster.stage_profile import Pace, StageProfile
from cluster.types import GroupHeader, Message, Task

LENGTH, GROUP_SIZE, NUM_GROUPS = 100, 4, 8
TOKENS = LENGTH * GROUP_SIZE * NUM_GROUPS
EVEN = StageProfile(
    source="closed form",
    iteration_s=0.01,
    sequence_s=0.001,
    score_s=0.0,
    score_latency_s=0.5,
    learn_group_s=0.05,
    learn_token_s=0.0002,
    sync_s=0.3,
    pause_s=0.1,
    drop_fraction=0.0,
    lengths=[[LENGTH] * GROUP_SIZE],
    world_size=1,
    workers=1,
    gpus_per_worker=1,
    max_policy_age=0,
    groups_per_step=NUM_GROUPS,
)
LEARN_S = NUM_GROUPS * EVEN.learn_group_s + TOKENS * EVEN.learn_token_s
HEAVY = msgspec.structs.replace(EVEN.with_lengths(100, 1.0, 2000), drop_fraction=0.1)


def forecast(profile: StageProfile, age: int, workers: int = 1, world_size: int = 1) -> Forecast:
    layout = Layout(
        workers=workers, world_size=world_size, max_policy_age=age, groups_per_step=NUM_GROUPS
    )
    return simulate(profile, layout)


def generate_s(num_sequences: int) -> float:
    return LENGTH * (EVEN.iteration_s + num_sequences * EVEN.sequence_s)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_sync_step_of_even_lengths_is_the_sum_of_its_stages(workers: int) -> None:
    rollout_s = generate_s(NUM_GROUPS * GROUP_SIZE // workers)
    expected = rollout_s + EVEN.score_latency_s + LEARN_S + EVEN.sync_s
    result = forecast(EVEN, 0, workers)
    assert result.step_s == pytest.approx(expected)
    assert result.rollout_idle == pytest.approx(1 - rollout_s / expected)
    assert result.learner_idle == pytest.approx(1 - LEARN_S / expected)
    assert result.age_max == 0


def test_with_rollouts_to_spare_a_step_ahead_costs_what_the_learner_and_the_sync_cost() -> None:
    result = forecast(EVEN, 3, workers=64)
    assert result.step_s == pytest.approx(LEARN_S + EVEN.sync_s)
    assert result.age_max == 3


def test_the_learner_goes_on_while_engines_take_over_the_weights() -> None:
    """But no step ends before they hold those of the step before, and in `sync` mode it waits."""
    held = msgspec.structs.replace(EVEN, hold_s=0.05)
    assert forecast(held, 3, workers=64).step_s == pytest.approx(LEARN_S + 0.05)
    assert forecast(held, 0) == forecast(EVEN, 0)
    slow = msgspec.structs.replace(held, sync_s=2 * LEARN_S)
    result = forecast(slow, 3, workers=64)
    assert result.step_s == pytest.approx(2 * LEARN_S)
    assert result.learner_idle == pytest.approx(0.5)


def test_with_a_learner_to_spare_a_step_ahead_costs_what_its_tokens_cost_the_engine() -> None:
    result = forecast(EVEN, 3, world_size=1000)
    most = 4 * NUM_GROUPS * GROUP_SIZE
    floor = NUM_GROUPS * GROUP_SIZE * generate_s(most) / most
    assert floor < result.step_s < (floor + EVEN.pause_s) * 1.1
    assert result.learner_idle > 0.9


def test_ranks_that_do_not_scale_keep_the_learner_longer() -> None:
    slow = msgspec.structs.replace(EVEN, learner_efficiency=0.9)
    extra = forecast(slow, 0, world_size=4).step_s - forecast(EVEN, 0, world_size=4).step_s
    assert extra == pytest.approx(LEARN_S / 4 * (1 / 0.9**2 - 1))


def test_a_machine_that_is_not_steady_takes_the_mean_of_its_steps() -> None:
    unsteady = msgspec.structs.replace(EVEN, paces=(Pace(0.5, 2.0), Pace(1.5, 2.0)))
    result = simulate(unsteady, Layout(workers=64, world_size=1, max_policy_age=3,
                                       groups_per_step=NUM_GROUPS), steps=200)  # fmt: skip
    assert result.step_s == pytest.approx(LEARN_S + 2 * EVEN.sync_s, rel=0.1)


def test_scoring_that_is_slower_than_all_else_bounds_the_step() -> None:
    slow = msgspec.structs.replace(EVEN, score_s=2.0)
    assert forecast(slow, 3).step_s == pytest.approx(2.0 * NUM_GROUPS, rel=0.02)


@pytest.mark.parametrize("age", [0, 1, 4])
@pytest.mark.parametrize("workers", [1, 5])
def test_groups_are_conserved_and_none_is_too_old(age: int, workers: int) -> None:
    result = forecast(HEAVY, age, workers)
    steps = 20 + age + 2
    assert result.num_used == steps * NUM_GROUPS
    assert result.num_dropped > 0
    accounted = result.num_used + result.num_dropped + result.num_under_way
    assert result.num_drawn == accounted
    assert result.num_under_way <= result.layout.num_slots
    assert 0 <= result.age_mean <= result.age_max <= age
    assert 0 <= result.rollout_idle < 1
    assert 0 <= result.learner_idle < 1


@pytest.mark.parametrize("age", [0, 1, 4])
def test_more_engines_or_ranks_never_slow_a_step_down(age: int) -> None:
    by_workers = [round(forecast(EVEN, age, workers=n).step_s, 9) for n in (1, 2, 4, 8)]
    by_ranks = [round(forecast(EVEN, age, world_size=n).step_s, 9) for n in (1, 2, 4, 8)]
    for times in (by_workers, by_ranks):
        assert times == sorted(times, reverse=True)
        assert age > 0 or times[0] > times[-1]


def test_a_long_tail_costs_a_sync_run_more_than_one_that_runs_ahead() -> None:
    gain = [forecast(p, 0, 4).step_s / forecast(p, 4, 4).step_s for p in (EVEN, HEAVY)]
    assert gain[1] > gain[0] > 1


def test_sequences_beyond_what_an_engine_holds_wait() -> None:
    half = NUM_GROUPS * GROUP_SIZE // 2
    narrow = msgspec.structs.replace(EVEN, max_running=half)
    extra = forecast(narrow, 0).step_s - forecast(EVEN, 0).step_s
    # The first half's learning runs beside the second half's rollouts.
    assert extra == pytest.approx(2 * generate_s(half) - generate_s(2 * half) - LEARN_S / 2)


@pytest.mark.parametrize("age", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_taken_in_as_a_run_takes_them(age: int, seed: int) -> None:
    """Random arrivals and drops through 12 steps: the same groups as `actors.intake` takes."""
    rng, num_groups = random.Random(seed), 5
    tasks = [
        Task(task_id=f"t{i}", taskset="demo", messages=[Message(role="user", content=str(i))])
        for i in range(200)
    ]
    sampling = Sampling(max_new_tokens=4, temperature=1.0, stop_token_ids=[0])
    curriculum = Curriculum(tasks, 0, sampling, 2)
    simulated, groups = intake_of(age, num_groups), dict[str, Group]()
    running: list[str] = []

    def draw(version: int, count: int) -> None:
        for _ in range(count):
            group_id = curriculum.next(version).group_id
            groups[group_id] = Group(1, 2, version)
            simulated.draw(groups[group_id])
            running.append(group_id)

    draw(0, (age + 1) * num_groups)
    left_over: list[GroupHeader] = []
    for version in range(12):
        intake: real.Intake = (
            real.WithinAge(curriculum, num_groups, version - age, left_over)
            if age
            else real.InDrawOrder(curriculum, num_groups)
        )
        taken = [h for batch in intake.offer([]) for h in batch]
        mine = simulated.take()
        while len(taken) < num_groups:
            group_id = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.2:
                curriculum.settle([group_id])
                simulated.drop(groups[group_id])
                draw(version, 1)
                offered = intake.offer([])
            else:
                simulated.add(groups[group_id])
                offered = intake.offer([_header(group_id, groups[group_id])])
            taken += [h for batch in offered for h in batch]
            while batch := simulated.take():
                mine += batch
        assert mine == [groups[h.group_id] for h in taken]
        left_over = intake.waiting
        curriculum.settle([h.group_id for h in intake.claimed])
        simulated.begin(version + 1)
        draw(version + 1, num_groups)


def _header(group_id: str, group: Group) -> GroupHeader:
    return GroupHeader(
        group_id=group_id, task_id="t", min_policy_version=group.drawn_at, num_tokens=[3, 3],
        num_loss_tokens=2, reward_versions={}, priority=0.0,
    )  # fmt: skip


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    config = """
    policy: {type: tiny}
    tasks: {train: {use: reasoning_gym}}
    rollout: {group_size: 4, groups_per_step: 8, max_policy_age: 0, max_new_tokens: 500}
    rewards: {verifiers: {correct: {use: task}}}
    """
    return RunDir.create(tmp_path_factory.mktemp("runs"), "seen", config, exist_ok=False)


def record(run: RunDir, steps: int, num_dropped: int = 0) -> None:
    """What a sync run with the rates of `EVEN` leaves behind, its lengths drawn at random; the
    first `num_dropped` groups of each step are dropped when the last is scored, and replaced.
    """
    rng, now = random.Random(1), 0.0
    groups, events = JsonLines(run.path / "groups.jsonl"), JsonLines(run.events)
    events.append({"time": now, "kind": "sync", "policy_version": 0})
    run.append_metrics(0, {"eval/pass@1": 0.5})
    for step in range(1, steps + 1):
        lengths = [[rng.randint(20, 400) for _ in range(4)] for _ in range(8 + num_dropped)]
        rollout_s, at = 0.0, now
        for begin, wave in enumerate([lengths[:8], lengths[8:]]):
            tokens, longest = sum(map(sum, wave)), max((max(g) for g in wave), default=0)
            wave_s = longest * EVEN.iteration_s + tokens * EVEN.sequence_s
            rollout_s, at = rollout_s + wave_s, at + wave_s + EVEN.score_latency_s
            for i, group in enumerate(wave):
                known = {"group_id": f"{step}-{begin}-{i}", "time": at}
                groups.append(
                    GroupLine(
                        **known,
                        fate=Fate.SAMPLED,
                        policy_version=step - 1,
                        completion_tokens=group,
                    )
                )
                if begin == 0 and i < num_dropped:
                    groups.append(GroupLine(**known, fate=Fate.DROPPED, reason="uniform"))
        used = sum(map(sum, lengths[num_dropped:]))
        learn_s = 8 * EVEN.learn_group_s + used * EVEN.learn_token_s
        step_s = at - now + learn_s + EVEN.sync_s
        now += step_s
        events.append({"time": now, "kind": "sync", "policy_version": step})
        busy = {"rollout": rollout_s, "learn": learn_s, "score": 0.2, "sync": EVEN.sync_s}
        row = {"policy_version": step, "time/step_s": step_s, "policy_age/mean": 0.0,
               "learner/num_loss_tokens": used,
               "rollout/tokens_per_s": sum(map(sum, lengths)) / step_s,
               "reward/correct/latency_s": 0.5, "sync/total_s": EVEN.sync_s,
               "sync/hold_s": 0.04, "sync/pause_s": EVEN.pause_s}  # fmt: skip
        for stage, seconds in busy.items():
            row[f"time/wait_s/{stage}"] = step_s - seconds
            name = "learner" if stage == "learn" else stage
            row[f"{name}/busy_fraction"] = seconds / step_s
        run.append_metrics(step, row)


@pytest.mark.parametrize("num_dropped", [0, 3])
def test_the_profile_of_a_run_has_the_rates_it_was_made_with(
    run_dir: RunDir, num_dropped: int
) -> None:
    record(run_dir, 20, num_dropped)
    profile = StageProfile.of_run(run_dir)
    assert profile.iteration_s == pytest.approx(EVEN.iteration_s)
    assert profile.sequence_s == pytest.approx(EVEN.sequence_s)
    assert profile.learn_group_s == pytest.approx(EVEN.learn_group_s)
    assert profile.learn_token_s == pytest.approx(EVEN.learn_token_s)
    assert (profile.sync_s, profile.pause_s) == pytest.approx((EVEN.sync_s, EVEN.pause_s))
    assert profile.hold_s == pytest.approx(0.04)
    assert profile.score_latency_s == pytest.approx(0.5)
    num_groups = 8 + num_dropped
    assert profile.score_s == pytest.approx(0.2 / num_groups)
    assert profile.drop_fraction == pytest.approx(num_dropped / num_groups)
    assert len(profile.lengths) == 10 * num_groups
    assert all((pace.learn, pace.sync) == pytest.approx((1, 1)) for pace in profile.paces)
    path = run_dir.path / "profile.json"
    profile.write(path)
    assert StageProfile.read(path) == profile


def test_of_a_run_ahead_the_engines_keep_the_speed_they_had(run_dir: RunDir) -> None:
    record(run_dir, 20)
    config = run_dir.config.read_text()
    run_dir.config.write_text(config.replace("max_policy_age: 0", "max_policy_age: 1"))
    profile, rows = StageProfile.of_run(run_dir), run_dir.read_metrics()[11:]
    busy_s = sum(row["rollout/busy_fraction"] * row["time/step_s"] for row in rows)
    tokens = sum(row["rollout/tokens_per_s"] * row["time/step_s"] for row in rows)
    running = 2 * 8 * 4
    token_s = profile.iteration_s / running + profile.sequence_s
    assert token_s == pytest.approx(busy_s / tokens, rel=0.05)


def test_a_run_that_is_too_short_has_no_profile(run_dir: RunDir) -> None:
    record(run_dir, 6)
    with pytest.raises(ConfigError, match="a profile needs 4"):
        StageProfile.of_run(run_dir)


def test_a_profile_that_cannot_be_is_refused(run_dir: RunDir) -> None:
    path = run_dir.path / "profile.json"
    bad = msgspec.to_builtins(EVEN) | {"drop_fraction": 1.0}
    path.write_bytes(msgspec.json.encode(bad))
    with pytest.raises(ConfigError, match=r"drop_fraction must be in \[0, 1\)"):
        StageProfile.read(path)
