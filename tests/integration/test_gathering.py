"""The groups of a step, from a real buffer, after a roll-back brought some of them back."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from actors.bookkeeping import Bookkeeping
from actors.curriculum import Curriculum
from actors.gathering import Gathering
from actors.rollout import Sampling
from actors.stages import Stages
from cluster.config import Config
from cluster.errors import LearnerLostError
from cluster.run_dir import RunDir
from cluster.types import GroupHeader, Task
from learners.group import LearnerGroup
from tests.replay_checker import fill, make_group

TASKS = [Task(task_id=f"t{i}", taskset="demo", messages=[]) for i in range(20)]


class Learner(LearnerGroup):
    """Takes in groups without ranks."""

    async def forward_backward(self, headers: Sequence[GroupHeader]) -> None:
        taken.append([header.group_id for header in headers])


taken: list[list[str]] = []


@pytest_asyncio.fixture
async def books(tiny_config: Config, tmp_path: Path, redis_url: str) -> Bookkeeping:
    run = RunDir.create(tmp_path, "gathers", "", exist_ok=False)
    run.own_buffer()
    books = Bookkeeping(tiny_config, run, redis_url)
    await books.take_over()
    return books


@pytest.fixture
def dropped() -> dict[str, str]:
    return {}


@pytest.fixture
def curriculum() -> Curriculum:
    return Curriculum(TASKS, 3, Sampling(8, 1.0, [1]), 4)


@pytest.fixture
def gathering(
    tiny_config: Config, books: Bookkeeping, curriculum: Curriculum, dropped: dict[str, str]
) -> Gathering:
    async def drop(group_ids: list[str], reason: str, _detail: str) -> None:
        dropped.update(dict.fromkeys(group_ids, reason))
        curriculum.settle(group_ids)

    taken.clear()
    return Gathering(tiny_config, books, Stages(["learn"]), asyncio.Event(), drop, set)


@pytest.fixture
def learner(tiny_config: Config) -> LearnerGroup:
    return Learner(list, tiny_config.learner)


async def test_a_group_that_an_earlier_life_dropped_is_claimed_beside_those_held(
    books: Bookkeeping, curriculum: Curriculum, gathering: Gathering, learner: LearnerGroup,
    dropped: dict[str, str],
) -> None:  # fmt: skip
    """`b` was dropped, so that `e` had its seat; now `b` comes, and `e` is sampled too early."""
    begun = curriculum.state()
    a, b, c, d, e = (curriculum.next().group_id for _ in range(5))
    fill(books.buffer, a, c, d, e)
    curriculum.restore(begun, books.buffer.versions())
    assert [curriculum.next().group_id for _ in range(4)] == [a, b, c, d]
    step = asyncio.create_task(gathering.step(learner, curriculum))
    await asyncio.sleep(0.2)
    fill(books.buffer, b)
    headers = await asyncio.wait_for(step, 5.0)
    assert [h.group_id for h in headers] == [a, b, c, d]
    assert taken == [[a], [b], [c], [d]], "each that counts as used has moved the weights"
    assert books.buffer.places()[e] == "ready"
    books.buffer.consume([h.group_id for h in headers], step=1)
    curriculum.settle([h.group_id for h in headers])
    books.policy_version = 1
    assert (await books.claim(4, 0.0, [])).too_old == [e]
    assert dropped == {}


async def test_a_drop_lets_groups_go_that_were_claimed_before_they_were_drawn(
    books: Bookkeeping, curriculum: Curriculum, gathering: Gathering, learner: LearnerGroup,
) -> None:  # fmt: skip
    """The draw that follows the dropped one is of a group that came long ago."""
    begun = curriculum.state()
    a, b, c, d, e = (curriculum.next().group_id for _ in range(5))
    fill(books.buffer, a, c, d, e)
    curriculum.restore(begun, books.buffer.versions())
    for _ in range(4):
        curriculum.next()
    step = asyncio.create_task(gathering.step(learner, curriculum))
    await asyncio.sleep(0.2)
    assert taken == [[a]]
    curriculum.settle([b])
    assert curriculum.next().group_id == e
    assert [h.group_id for h in await asyncio.wait_for(step, 5.0)] == [a, c, d, e]
    assert taken == [[a], [c], [d], [e]]


async def test_what_steps_leave_over_until_it_is_too_old_is_dropped(
    tiny_config: Config, books: Bookkeeping, curriculum: Curriculum, learner: LearnerGroup
) -> None:
    """A roll-back brings back more groups than there are seats for."""

    async def drop(group_ids: list[str], _reason: str, _detail: str) -> None:
        assert group_ids == [], "they still have time"

    rollout = tiny_config.rollout.model_copy(update={"max_policy_age": 1})
    config = tiny_config.model_copy(update={"rollout": rollout})
    books._config = config
    gathering = Gathering(config, books, Stages(["learn"]), asyncio.Event(), drop, set)
    for i in range(12):
        books.buffer.add(make_group(f"g{i:02}", policy_version=1 if i < 8 else 0))
    curriculum.restore(curriculum.state(), books.buffer.versions())
    for step in (1, 2):
        books.policy_version = step
        headers = await asyncio.wait_for(gathering.step(learner, curriculum), 5.0)
        used = [header.group_id for header in headers]
        assert used == [f"g{i:02}" for i in (range(8, 12) if step == 1 else range(4))]
        books.buffer.consume(used, step=step)
        curriculum.settle(used)
    books.policy_version = 3
    assert (await books.claim(4, 0.0, [])).too_old == ["g04", "g05", "g06", "g07"]


async def test_a_learner_that_is_lost_while_a_step_waits_is_missed_at_once(
    gathering: Gathering, curriculum: Curriculum, tiny_config: Config
) -> None:
    """Before any group comes, which may need an engine that is lost, too."""

    class Lost(Learner):
        async def check(self) -> None:
            raise LearnerLostError("learn", "a rank died")

    curriculum.next()
    step = gathering.step(Lost(list, tiny_config.learner), curriculum)
    with pytest.raises(LearnerLostError, match="a rank died"):
        await asyncio.wait_for(step, 5.0)
