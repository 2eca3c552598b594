"""When the buffer tells another story than ledger and checkpoint do, or an unreadable one."""

import asyncio
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from actors.bookkeeping import LOST_WEIGHTS, SKIPPED, Bookkeeping
from actors.curriculum import Curriculum
from actors.gathering import MAX_UNREADABLE, Gathering
from actors.intake import InDrawOrder
from actors.rollout import Sampling
from actors.stages import Stages
from cluster.config import Config
from cluster.errors import GroupsVanishedError, StageError
from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.ledger import Ledger
from cluster.reconcile import reconcile
from cluster.replay_buffer import AddResult
from cluster.replay_records import DeadLetter
from cluster.run_dir import RunDir
from cluster.run_state import RunState
from cluster.types import StepRecord, StepResult, Task
from learners.group import LearnerGroup
from tests.replay_checker import claim, fill, make_group


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path, "back", "", exist_ok=False)
    run.own_buffer()
    return run


@pytest_asyncio.fixture
async def books(tiny_config: Config, run: RunDir, redis_url: str) -> Bookkeeping:
    books = Bookkeeping(tiny_config, run, redis_url)
    await books.take_over()
    return books


def used(step: int, group_id: str) -> StepRecord:
    return StepRecord(
        step=step, policy_version=step, group_ids=[group_id], policy_versions=[0],
        reward_versions={}, num_loss_tokens=1,
    )  # fmt: skip


async def test_a_redis_that_lost_its_last_second_brings_no_group_back_that_was_used(
    books: Bookkeeping,
) -> None:
    fill(books.buffer, "used", "new")
    claim(books.buffer)
    books._ledger.commit(used(1, "used"))  # and that it was consumed is lost
    books.step = books.policy_version = 1
    assert books._roll_back() == {"new": 0}
    assert books.buffer.places() == {"new": "ready"}
    stats = books.buffer.stats()
    assert (stats.acknowledged, stats.num_unaccounted) == (1, 0)


async def test_groups_of_a_damaged_checkpoint_are_sampled_again(
    books: Bookkeeping, run: RunDir
) -> None:
    """The buffer let go of them when it was published."""
    fill(books.buffer, "a", "b")
    claim(books.buffer)
    for step, group_id in [(1, "a"), (2, "b")]:
        books.buffer.consume([group_id], step=step)
        books._ledger.commit(used(step, group_id))
    books.buffer.acknowledge(2)
    books.step = books.policy_version = 1
    assert books._roll_back() == {}
    assert books.buffer.add(make_group("b")) is AddResult.ADDED
    assert books.buffer.add(make_group("a")) is AddResult.DUPLICATE
    assert books.buffer.stats().num_unaccounted == 0
    [line] = [line for line in GroupLog(run).read() if line.group_id == "b"]
    assert (line.fate, line.reason) == (Fate.DROPPED, LOST_WEIGHTS)


async def test_a_roll_back_that_was_cut_short_is_done_again(
    books: Bookkeeping, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis went away amid it, and the controller with it."""
    fill(books.buffer, "a")
    claim(books.buffer)
    books.buffer.consume(["a"], step=1)
    books._ledger.commit(used(1, "a"))
    books.buffer.acknowledge(1)
    with monkeypatch.context() as patch:
        patch.setattr(books.buffer, "readmit", None)
        with pytest.raises(TypeError):
            books._roll_back()
    assert len(Ledger(run.ledger).records()) == 1
    assert books._roll_back() == {}
    assert Ledger(run.ledger).records() == []
    assert books.buffer.add(make_group("a")) is AddResult.ADDED


async def test_the_groups_of_a_skipped_step_that_is_undone_are_sampled_again(
    books: Bookkeeping, run: RunDir
) -> None:
    """Else the step would not come out as it did before."""
    fill(books.buffer, "kept", "undone")
    for step, header in enumerate(books.buffer.claim(2, owner=books._owner, wait_s=0.0), start=1):
        result = StepResult(step=step, policy_version=0, metrics={})
        assert await books.commit([header], result) == []
    assert books.buffer.places() == {}
    assert books.buffer.stats().dropped == {SKIPPED: 2}
    assert [(r.group_ids, r.skipped) for r in Ledger(run.ledger).records()] == [
        ([], ["kept"]), ([], ["undone"]),
    ]  # fmt: skip
    for group_id in ("kept", "undone"):
        assert books.buffer.add(make_group(group_id)) is AddResult.DUPLICATE, "comes late"
    books.step = 1
    assert books._roll_back() == {}
    assert books.buffer.add(make_group("undone")) is AddResult.ADDED
    assert books.buffer.add(make_group("kept")) is AddResult.DUPLICATE
    assert books.buffer.stats().num_unaccounted == 0


async def test_a_skipped_step_whose_groups_were_not_dropped_yet_gives_them_back(
    books: Bookkeeping,
) -> None:
    """The controller died between the ledger and the buffer."""
    fill(books.buffer, "a")
    claim(books.buffer)
    books._ledger.commit(msgspec.structs.replace(used(1, "a"), group_ids=[], skipped=["a"]))
    assert books._roll_back() == {"a": 0}
    assert books.buffer.places() == {"a": "ready"}


async def test_a_buffer_of_dead_letters_alone_ends_the_run(
    books: Bookkeeping, tiny_config: Config
) -> None:
    dropped: list[str] = []

    async def drop(group_ids: list[str], _reason: str, _detail: str) -> None:
        dropped.extend(group_ids)

    num_groups = tiny_config.rollout.groups_per_step
    gathering = Gathering(tiny_config, books, Stages(["learn"]), asyncio.Event(), drop, set)
    intake = InDrawOrder(Curriculum([], 0, Sampling(8, 1.0, [1]), 4), num_groups)
    letters = [
        DeadLetter(
            id=f"{i}-0", group_id=f"g{i}", reason="torn", deliveries=1, died_at=0.0, payload=b""
        )
        for i in range(num_groups + MAX_UNREADABLE + 1)
    ]
    await gathering._bury(letters[:-1], intake)
    with pytest.raises(StageError, match=r"one step went to the dead letters .* for: torn"):
        await gathering._bury(letters[-1:], intake)
    assert dropped == [letter.group_id for letter in letters]


async def test_a_group_that_is_damaged_after_it_moved_the_weights_is_no_dead_letter(
    books: Bookkeeping,
) -> None:
    fill(books.buffer, "used")
    [header] = books.buffer.claim(1, owner=books._owner, wait_s=0.0)
    payloads = books.buffer._keys.payloads
    books.buffer._client.hset(payloads, "used", b"rubbish")
    assert await books.commit([header], StepResult(step=1, policy_version=1, metrics={})) == []
    assert books.buffer.places() == {"used": "consumed"}
    assert books.buffer.stats().dropped == {}


async def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_nothing(
    books: Bookkeeping, tiny_config: Config
) -> None:
    (books.store.begin(0) / "shard").write_bytes(b"weights")
    state = RunState(run_id="back", step=0, policy_version=0, config_hash="h")
    (books.store.commit(0, state) / "shard").write_bytes(b"weight")
    curriculum = Curriculum([], 0, Sampling(8, 1.0, [1]), 4)
    for _ in range(2):  # nor when it is tried again, and what was damaged has been put aside
        assert books.has_checkpoint
        with pytest.raises(StageError, match=r"every checkpoint in .* is damaged"):
            await books.restore(LearnerGroup(list, tiny_config.learner), curriculum)


async def test_groups_that_redis_has_lost_are_booked_as_dropped(
    books: Bookkeeping, run: RunDir
) -> None:
    """Those that a step used are not in it, either, and stay what they are."""
    for name in ("used", "lost", "dropped", "held"):
        books._groups.append(GroupLine(group_id=name, fate=Fate.SAMPLED))
    books.note_dropped("dropped", SKIPPED, "")
    books._ledger.commit(used(1, "used"))
    books.step = books.policy_version = 1
    fill(books.buffer, "held")
    assert books._roll_back() == {"held": 0}
    last = {line.group_id: line for line in GroupLog(run).read()}
    assert {name: line.reason for name, line in last.items()} == {
        "used": "", "lost": LOST_WEIGHTS, "dropped": SKIPPED, "held": "",
    }  # fmt: skip


async def test_a_group_that_was_used_is_booked_although_its_line_is_lost(
    books: Bookkeeping, run: RunDir
) -> None:
    """The machine of the run lost power: its checkpoint and ledger were written through."""
    books._ledger.commit(used(1, "used"))
    fill(books.buffer, "used")
    claim(books.buffer)
    books.buffer.consume(["used"], step=1)
    books.step = books.policy_version = 1
    for _ in range(2):
        assert books._roll_back() == {}
        assert [(line.group_id, line.fate) for line in GroupLog(run).read()] == [
            ("used", Fate.HELD)
        ]
        assert reconcile(run, books.buffer).faults == []


async def test_a_lease_that_only_redis_knows_of_ends_by_itself(
    tiny_config: Config, run: RunDir, redis_url: str
) -> None:
    """That the group was given back is lost: it must come again, or the step waits for it."""
    brief = tiny_config.buffer.model_copy(update={"lease_s": 0.4})
    books = Bookkeeping(tiny_config.model_copy(update={"buffer": brief}), run, redis_url)
    await books.take_over()
    fill(books.buffer, "held", "given back")
    held = (await books.claim(2, 0.0, [])).headers[:1]
    for _ in range(5):
        await asyncio.sleep(0.15)
        assert (await books.claim(0, 0.0, held)).dead == []
    assert books.buffer.places() == {"held": "leased", "given back": "ready"}


async def test_groups_that_neither_redis_nor_a_producer_has_are_missed_at_the_second_look(
    books: Bookkeeping, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.gathering.LOOK_S", 0.0)
    tasks = [Task(task_id=name, taskset="t", messages=[]) for name in ("a", "b", "c", "d")]
    curriculum = Curriculum(tasks, 0, Sampling(8, 1.0, [1]), 4)
    stored, produced, lost, undone = (curriculum.next().group_id for _ in tasks)
    fill(books.buffer, undone, stored)
    books.buffer.consume([undone], step=1)  # and that a roll-back took it back is lost

    async def drop(_ids: list[str], _reason: str, _detail: str) -> None:
        raise AssertionError("nothing is dropped")

    gathering = Gathering(
        tiny_config, books, Stages(["learn"]), asyncio.Event(), drop, lambda: {produced}
    )
    await gathering._look_for_vanished(curriculum)
    with pytest.raises(GroupsVanishedError, match="lost 2 groups, the first of them"):
        await gathering._look_for_vanished(curriculum)
    curriculum.settle([lost, undone])
    await gathering._look_for_vanished(curriculum)
    with pytest.raises(GroupsVanishedError, match="lost groups of step 1"):
        books.buffer.consume([lost], step=1)
