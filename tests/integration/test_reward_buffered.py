"""Groups that wait in the buffer while rewards change; changes that fail after they went live."""

import asyncio
from pathlib import Path

import pytest

from actors.reward_set import WorkerSet
from cluster.errors import BufferUnavailableError, StageError
from tests.reward_cases import count_actors, house, verifiers

pytestmark = pytest.mark.usefixtures("reward_cluster")


@pytest.mark.timeout(200)
async def test_buffered_groups_are_kept_rescored_or_dropped(tmp_path: Path, url: str):
    async with house(tmp_path, url) as home:
        dropped: list[str] = []

        async def note(ids: list[str], reason: str) -> None:
            dropped.extend(ids)

        home.admin._buffered.on_drop = note
        for _ in range(3):
            await home.score()
        answer = await home.ask("try", verifiers=verifiers(bonus=2.0), groups=8)
        assert answer["report"]["num_groups"] == 3
        assert answer["report"]["mean_difference"] == pytest.approx(2.0)
        first = home.pool.live.label
        await home.ask("swap", verifiers=verifiers(bonus=1.0), buffered="keep")
        assert {g.reward_versions["rubric"] for g in home.buffer.sample(8)} == {first}
        answer = await home.ask("swap", verifiers=verifiers(bonus=2.0), buffered="rescore")
        assert answer["buffered"] == 3
        for group in home.buffer.sample(8):
            assert group.reward_versions["rubric"] == answer["to"]
            assert group.rewards == [3.0, 2.0, 2.0, 3.0]
        assert home.buffer.stats().ready == 3
        answer = await home.ask("rollback", buffered="drop")
        assert len(dropped) == 3
        assert home.buffer.stats().ready == 0
        assert home.buffer.stats().dropped == {"reward_swapped": 3}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("use", ["Outage", "HalfOutage"])
async def test_a_group_that_an_outage_would_cost_keeps_its_rewards(
    tmp_path: Path, url: str, plugins: Path, monkeypatch: pytest.MonkeyPatch, use: str
):
    """All checks abstain, or all but those of the passes, which alone teach nothing."""
    async with house(tmp_path, url) as home:
        for _ in range(3):
            await home.score()
        first = home.pool.live.label
        cut_over = home.pool.cut_over

        def then_down(workers: WorkerSet) -> WorkerSet | None:
            (plugins / "down").touch()
            return cut_over(workers)

        monkeypatch.setattr(home.pool, "cut_over", then_down)
        try:
            answer = await home.ask("swap", verifiers=verifiers(use), buffered="rescore")
            assert answer["buffered"] == 3
            assert "3 buffered groups stay as they were" in answer["warnings"][-1]
            told = {"version": answer["to"], "num_unscored": 3}
            assert ("reward_buffered", told) in home.events
            for group in home.buffer.sample(8):
                assert group.rewards == [1.0, 0.0, 0.0, 1.0]
                assert group.reward_versions["rubric"] == first
            assert len(home.buffer.places()) == 3
            assert home.buffer.stats().dropped == {}
        finally:
            (plugins / "down").unlink(missing_ok=True)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("choice", ["rescore", "drop"])
async def test_a_group_whose_lease_has_passed_to_the_learner_is_left_to_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, choice: str
):
    async with house(tmp_path, url) as home:
        dropped: list[str] = []

        async def note(ids: list[str], reason: str) -> None:
            dropped.extend(ids)

        buffered = home.admin._buffered
        buffered.on_drop = note
        for _ in range(2):
            await home.score()
        take = buffered._buffer.take

        def lose(group_ids: list[str], owner: str) -> list[str]:
            taken = take(group_ids, owner)
            if taken:
                home.buffer.release(["live-1"], owner)
                home.buffer.take(["live-1"], "learner")
            return taken

        monkeypatch.setattr(buffered._buffer, "take", lose)
        answer = await home.ask("swap", verifiers=verifiers("Flat"), buffered=choice)
        assert answer["buffered"] == 2
        assert dropped == ["live-2"]
        assert home.buffer.places() == {"live-1": "leased"}
        assert home.buffer.fetch(["live-1"])[0].rewards == [1.0, 0.0, 0.0, 1.0]
        assert home.buffer.release(["live-1"], "learner") == 1


@pytest.mark.timeout(200)
async def test_a_change_that_went_live_is_told_whatever_fails_after_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    async with house(tmp_path, url) as home:
        await home.score()

        async def outage(*arguments: object) -> None:
            raise BufferUnavailableError("Redis is gone")

        monkeypatch.setattr(home.admin._buffered, "treat", outage)
        answer = await home.ask("swap", verifiers=verifiers(bonus=1.0), buffered="rescore")
        assert home.pool.live.label == answer["to"]
        assert "is live, but --buffered rescore failed" in answer["warnings"][-1]
        assert [kind for kind, _ in home.events] == ["reward_swapped", "reward_buffered"]
        monkeypatch.undo()

        await home.ask("shadow", verifiers=verifiers(bonus=2.0))
        cut_over = home.pool.cut_over

        def dies_meanwhile(workers: WorkerSet) -> None:
            cut_over(workers)
            home.admin._end_shadow("failed")

        monkeypatch.setattr(home.pool, "cut_over", dies_meanwhile)
        answer = await home.ask("promote")
        assert home.pool.live.label == answer["to"]
        assert "reward_refused" not in [kind for kind, _ in home.events]
        monkeypatch.undo()

        before, num_alive = home.pool.live.label, count_actors()
        (home.run.path / "rewards.json.tmp").mkdir()
        with pytest.raises(StageError, match="IsADirectoryError"):
            await home.ask("swap", verifiers=verifiers(bonus=3.0))
        assert home.pool.live.label == before
        for _ in range(50):
            if count_actors() <= num_alive:
                break
            await asyncio.sleep(0.2)
        assert count_actors() <= num_alive, "workers that did not go live are ended"


@pytest.mark.timeout(200)
async def test_groups_under_way_at_a_cut_over_are_rescored_too(
    tmp_path: Path, url: str, plugins: Path
):
    async with house(tmp_path, url) as home:
        await home.ask("swap", verifiers=verifiers("Gated"))
        for _ in range(6):
            await home.score()
        (plugins / "gate").touch()
        try:
            late = asyncio.create_task(home.score())
            answer = await home.ask("swap", verifiers=verifiers(bonus=2.0), buffered="rescore")
            assert answer["buffered"] == 6
            assert not late.done()
        finally:
            (plugins / "gate").unlink()
        assert (await late).reward_versions["rubric"] == answer["from"]
        for _ in range(50):
            labels = {g.reward_versions["rubric"] for g in home.buffer.sample(16)}
            if labels == {answer["to"]}:
                break
            await asyncio.sleep(0.2)
        assert labels == {answer["to"]}
        assert home.buffer.stats().ready == 7
        assert {tuple(g.rewards) for g in home.buffer.sample(16)} == {(3.0, 2.0, 2.0, 3.0)}
