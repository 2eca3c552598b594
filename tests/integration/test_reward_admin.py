"""Live reward administration on real Ray actors, a real Redis and the real door."""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from actors.reward_worker import GroupSummary
from benchmarks.live_swaps import CRASHES, Changes, is_mixed
from cluster import reward_state, wire
from cluster.control import ControlClient
from cluster.errors import ConfigError, DeadlineError, StageError
from tests.reward_cases import PLUGIN, count_actors, house, live_group, verifiers

pytestmark = pytest.mark.usefixtures("reward_cluster")


@pytest.mark.timeout(280)
@pytest.mark.parametrize("rounds", [2, pytest.param(7, marks=pytest.mark.slow)])
async def test_changes_under_load_lose_nothing_and_mix_nothing(
    tmp_path: Path, url: str, rounds: int
):
    async with house(tmp_path, url) as home:
        summaries: list[GroupSummary] = []
        is_over = asyncio.Event()

        async def load() -> None:
            while not is_over.is_set():
                summaries.extend(await asyncio.gather(*[home.score() for _ in range(4)]))
                await asyncio.sleep(0.05)

        loads = asyncio.create_task(load())
        for i in range(rounds):
            await home.ask("swap", verifiers=verifiers(bonus=float(i + 1)))
            summaries.append(await home.score())
            await home.ask("rollback")
            await home.ask("shadow", verifiers=verifiers(bonus=float(i + 101)))
            await home.ask("promote")
            summaries.append(await home.score())
        is_over.set()
        await loads
        swaps = [fields for kind, fields in home.events if kind == "reward_swapped"]
        assert Counter(s["action"] for s in swaps) == dict.fromkeys(
            ("swap", "rollback", "promote"), rounds
        )
        assert max(float(str(s["cutover_ms"])) for s in swaps) < 1000
        ids = [f"live-{i + 1}" for i in range(home.num_groups)]
        assert sorted(s.group_id for s in summaries) == sorted(ids)
        assert {s.outcome for s in summaries} == {"added"}
        assert home.buffer.stats().added == len(ids)
        known = reward_state.load(home.run.path)
        assert known is not None
        for group in home.buffer.fetch(ids):
            version = known.get(group.reward_versions["rubric"])
            assert version is not None
            bonus = version.verifiers["answer"]["settings"].get("bonus", 0.0)
            assert group.rewards == [1 + bonus, bonus, bonus, 1 + bonus]
            stamps = {t.verdicts[0].reward_version for t in group.trajectories}
            assert stamps == {version.signals["answer"]}
        assert len({s.reward_versions["rubric"] for s in summaries}) == 2 * rounds + 1


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_the_changes_of_the_live_benchmark_find_a_mixed_group(tmp_path: Path, url: str):
    async with house(tmp_path, url) as home:
        loop = asyncio.get_running_loop()

        def wait(count: int) -> None:
            for _ in range(4 * count):
                asyncio.run_coroutine_threadsafe(home.score(), loop).result(60)

        def change() -> Changes:
            changes = Changes(home.run, url, wait)
            changes.crash(tmp_path / "mark")
            changes.carry_out(3, 120.0)
            return changes

        changes = await asyncio.to_thread(change)
        assert changes.num_unmoved == len(CRASHES)
        assert len(changes.seen) == home.num_groups
        assert not any(changes.seen.values())
        actions = [fields["action"] for kind, fields in home.events if kind == "reward_swapped"]
        assert actions == ["swap", "rollback", "promote"]
        state = reward_state.load(home.run.path)
        assert state is not None
        [group] = home.buffer.sample(1)
        other = next(v.label for v in state.versions if v.label != group.reward_versions["rubric"])
        assert not is_mixed(group, state)
        labelled = {**group.reward_versions, "rubric": other}
        assert is_mixed(msgspec.structs.replace(group, reward_versions=labelled), state)
        one = msgspec.structs.replace(group.trajectories[1], reward=7.5)
        trajectories = [group.trajectories[0], one, *group.trajectories[2:]]
        assert is_mixed(msgspec.structs.replace(group, trajectories=trajectories), state)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("Nothing", "has no 'Nothing'"),
        ("Wrong", "gold answers fail"),
        ("DiesBuilt", "the candidate to facts"),
        ("DiesOnGold", "died in self_check"),
        ("DiesInWorkers", "rubric 2-"),
    ],
)
async def test_a_bad_candidate_is_refused_and_changes_nothing(
    tmp_path: Path, url: str, plugins: Path, use: str, words: str
):
    (plugins / "started").unlink(missing_ok=True)
    async with house(tmp_path, url) as home:
        before = home.pool.live.label
        with pytest.raises(StageError, match=words):
            await home.ask("swap", verifiers=verifiers(use))
        assert (await home.score()).reward_versions["rubric"] == home.pool.live.label == before
        assert len((await home.ask("list"))["state"]["versions"]) == 1
        assert [kind for kind, _ in home.events] == ["reward_refused"]


@pytest.mark.timeout(200)
async def test_a_shadow_has_no_influence_reports_and_may_die(tmp_path: Path, url: str):
    async with house(tmp_path, url) as home:
        await home.ask("shadow", verifiers=verifiers(bonus=1.0))
        for _ in range(22):
            assert (await home.score()).rewards == [1.0, 0.0, 0.0, 1.0]
            await asyncio.sleep(0.05)
        for _ in range(50):
            report = (await home.ask("list"))["report"]
            if report["num_groups"] + report["num_skipped"] == 22:
                break
            await asyncio.sleep(0.2)
        assert report["num_groups"] + report["num_skipped"] >= 20
        assert report["mean_difference"] == pytest.approx(1.0)
        assert report["num_disagree"] == 2 * report["num_groups"]
        await asyncio.sleep(1.0)
        await home.ask("shadow", stop=True)
        await home.ask("shadow", verifiers=verifiers("DiesLive"))
        for _ in range(6):
            assert (await home.score()).rewards == [1.0, 0.0, 0.0, 1.0]
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.5)
        assert [k for k, _ in home.events if k.startswith("reward_shadow")] == [
            "reward_shadow_started", "reward_shadow_report", "reward_shadow_stopped",
            "reward_shadow_started", "reward_shadow_failed",
        ]  # fmt: skip
        with pytest.raises(StageError, match="no candidate is in the shadow"):
            await home.ask("promote")


@pytest.mark.timeout(200)
async def test_a_golden_set_is_checked_at_the_start_at_a_swap_and_at_a_rollback(
    tmp_path: Path, url: str, plugins: Path
):
    lie = {"reference": "a", "completion": "b", "score": 1.0}
    with pytest.raises(StageError, match="the golden completion 'b' for 'a' must score 1, got 0"):
        async with house(tmp_path, url, golden=[lie]):
            raise AssertionError("it must not start")
    async with house(tmp_path, url, "other") as home:
        await home.ask("swap", verifiers=verifiers("Outage"))
        with pytest.raises(StageError, match="must score 1, got 0"):
            await home.ask("swap", verifiers={"answer": verifiers()["answer"] | {"golden": [lie]}})
        await home.ask("swap", verifiers=verifiers(bonus=1.0))
        live = home.pool.live.label
        (plugins / "down").touch()
        try:
            with pytest.raises(StageError, match="gold answers fail"):
                await home.ask("rollback")
        finally:
            (plugins / "down").unlink()
        assert home.pool.live.label == live
        assert (await home.score()).rewards == [2.0, 1.0, 1.0, 2.0]
        assert (await home.ask("rollback"))["to"] != live


@pytest.mark.timeout(200)
async def test_a_request_whose_turn_comes_late_is_refused_and_a_trial_holds_nobody_up(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    async with house(tmp_path, url) as home:
        await home.score()
        await home.ask("swap", verifiers=verifiers(bonus=1.0))
        live = home.pool.live.label
        client = ControlClient(home.run)
        async with home.admin._change:
            with pytest.raises(DeadlineError):
                await asyncio.to_thread(client.ask, "rewards.rollback", {}, 1.0)
        await asyncio.sleep(1.0)
        assert home.pool.live.label == live
        assert [kind for kind, _ in home.events] == ["reward_swapped", "reward_refused"]
        async with home.admin._trial:
            trial = asyncio.create_task(home.ask("try", verifiers=verifiers(bonus=2.0)))
            await asyncio.sleep(1.0)
            assert (await home.ask("rollback"))["from"] == live
            assert not trial.done()
        assert (await trial)["gold"] == ""
        assert home.events[-1][0] == "reward_tried"
        assert home.events[-1][1]["num_groups"] == 1


@pytest.mark.timeout(200)
async def test_an_evaluation_sees_one_version_however_often_rewards_change(
    tmp_path: Path, url: str
):
    async with house(tmp_path, url) as home:
        first = home.pool.live.label
        with home.pool.one_version() as score:
            for i in range(2):  # the second change retires the first version
                await home.ask("swap", verifiers=verifiers(bonus=float(i + 1)))
            await asyncio.sleep(0.5)
            summary, _ = await score(wire.encode(live_group(900)))
            assert summary.reward_versions["rubric"] == first
            assert (await home.score()).reward_versions["rubric"] == home.pool.live.label != first
        await asyncio.sleep(0.5)
        with pytest.raises(StageError):
            await score(wire.encode(live_group(901)))


@pytest.mark.timeout(200)
async def test_a_resumed_run_goes_on_with_the_promoted_rubric(tmp_path: Path, url: str):
    async with house(tmp_path, url) as home:
        await home.ask("swap", verifiers=verifiers(bonus=1.0))
        promoted = home.pool.live.label
    with pytest.raises(ConfigError, match="must be training"):
        await asyncio.to_thread(ControlClient, home.run)
    async with house(tmp_path, url) as home:
        assert home.pool.live.label == promoted
        assert (await home.score()).rewards == [2.0, 1.0, 1.0, 2.0]
        answer = await home.ask("rollback")
        assert answer["to"].startswith("1-")
        assert home.admin.versions["rubric"] == answer["to"]


@pytest.mark.timeout(200)
async def test_changed_code_is_another_version_and_a_killed_worker_is_replaced(
    tmp_path: Path, url: str, plugins: Path
):
    async with house(tmp_path, url) as home:
        first = home.pool.live.label
        os.kill(home.pool.statuses()[0].pid, 9)
        assert (await home.score()).rewards == [1.0, 0.0, 0.0, 1.0]
        assert "worker_died" in [kind for kind, _ in home.events]
        path = plugins / "live_rewards.py"
        path.write_text(PLUGIN.replace("bonus=0.0):\n        self", "bonus=0.5):\n        self"))
        try:
            answer = await home.ask("swap", verifiers=verifiers())
            assert answer["from"] == first
            assert (await home.score()).rewards == [1.5, 0.5, 0.5, 1.5]
        finally:
            path.write_text(PLUGIN)


@pytest.mark.timeout(200)
async def test_a_rollback_starts_workers_in_place_of_warm_ones_that_died(tmp_path: Path, url: str):
    async with house(tmp_path, url) as home:
        first, pids = home.pool.live.label, [status.pid for status in home.pool.statuses()]
        await home.ask("swap", verifiers=verifiers(bonus=1.0))
        num_actors = count_actors()
        os.kill(pids[0], 9)
        assert (await home.ask("rollback"))["to"] == first
        assert not {status.pid for status in home.pool.statuses()} & set(pids)
        assert (await home.score()).rewards == [1.0, 0.0, 0.0, 1.0]
        for _ in range(50):
            if count_actors() == num_actors:
                break
            await asyncio.sleep(0.1)
        assert count_actors() == num_actors, "of those that died none is left"
        await home.ask("rollback")
        assert (await home.score()).rewards == [2.0, 1.0, 1.0, 2.0]


async def test_a_request_past_its_deadline_is_not_carried_out(tmp_path: Path, url: str):
    async with house(tmp_path, url) as home:
        client = ControlClient(home.run)
        listener = home.admin.door._listener
        assert listener is not None
        listener.cancel()  # nobody answers
        await asyncio.sleep(1.0)
        with pytest.raises(DeadlineError, match="not answered in 1 s"):
            await asyncio.to_thread(client.ask, "rewards.rollback", {}, 1.0)
        assert home.admin.door._server.next(0.1) is None


@pytest.mark.timeout(200)
async def test_the_command_line_changes_a_run_of_another_process(tmp_path: Path, url: str):
    async def hone(*arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from serve.cli import main; main()", "rewards", *arguments,
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode()

    async with house(tmp_path, url) as home:
        await home.score()
        first = home.pool.live.label
        code, output = await hone("swap", "demo", "answer.settings={bonus: 1.0}")
        assert code == 0, output
        assert f"{first} -> {home.pool.live.label} (keep 0 buffered)" in output
        assert (await home.score()).rewards == [2.0, 1.0, 1.0, 2.0]
        code, output = await hone("swap", "demo", "answer.use=live_rewards:Wrong")
        assert code == 1
        assert "gold answers fail" in output
        code, output = await hone("rollback", "demo")
        assert (code, home.pool.live.label) == (0, first), output
        code, output = await hone("list", "demo")
        assert f"live    {first}" in output
        code, output = await hone("try", "demo", "answer.weight=2.0", "--groups", "4")
        assert "groups 2" in output
    code, output = await hone("rollback", "demo")
    assert code == 2
    assert "must be training to be changed" in output
    code, output = await hone("list", "demo")
    assert "(the run is not training)" in output
