"""Engines and the versions they hold, whoever waits for them or leaves; the engines are fake."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve import engine_pool
from serve.api_errors import ApiError
from serve.engine_pool import BadWeightsError, EnginePool, Slot
from serve.kept_versions import Weights
from tests.fake_engine import FakeEngine, Starter, until


@pytest.fixture(autouse=True)
def _no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are empty: they need not be weights."""
    monkeypatch.setattr(engine_pool, "check_file", lambda _path, _policy_dir: "")


class Engines:
    """A pool of two with version 1 in its first engine."""

    def __init__(self, folder: Path, max_engines: int = 2) -> None:
        self.starter = Starter()
        self.in_use: list[int] = []
        self.reserved = {1}
        self.pool = EnginePool(self.starter.start, max_engines, folder, self.using)
        self._folder = folder

    @contextmanager
    def using(self, weights: Weights) -> Generator[None]:
        self.in_use.append(weights.policy_version)
        yield
        self.in_use.remove(weights.policy_version)

    def weights(self, version: int) -> Weights:
        path = self._folder / f"{version}.safetensors"
        path.touch()
        return Weights(version, path, float(version))

    async def open(self) -> "Engines":
        await self.pool.open()
        await self.pool.move(self.pool.stable, self.weights(1))
        return self

    def pin(self, version: int) -> asyncio.Task[Slot]:
        return asyncio.create_task(
            self.pool.exact(self.weights(version), lambda: self.reserved, may_share_stable=False)
        )

    def engine(self, index: int) -> FakeEngine:
        return self.starter.engines[index]


async def leave(task: asyncio.Task[Slot]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_load_goes_on_when_its_request_has_gone(tmp_path: Path) -> None:
    engines = await Engines(tmp_path).open()
    first = await engines.pin(2)
    engine = engines.engine(1)
    engine.goes_on.clear()
    waiting = engines.pin(3)
    await until(lambda: engine.is_paused)
    assert first.is_moving
    await leave(waiting)
    assert engines.in_use == [3], "its file stays"
    again = engines.pin(3)
    engine.goes_on.set()
    slot = await again
    assert (slot is first, slot.policy_version, engine.policy_version) == (True, 3, 3)
    assert engine.loaded == [2, 3], "loaded once"
    assert (engine.is_paused, slot.is_moving, engines.in_use) == (False, False, [])


async def test_a_move_goes_on_when_its_request_has_gone(tmp_path: Path) -> None:
    engines = await Engines(tmp_path).open()
    engine, slot = engines.engine(0), engines.pool.stable
    engine.goes_on.clear()
    moving = asyncio.create_task(engines.pool.move(slot, engines.weights(2)))
    await until(lambda: engine.is_paused)
    moving.cancel()
    await asyncio.gather(moving, return_exceptions=True)
    assert slot.policy_version == 1
    engine.goes_on.set()
    await until(lambda: slot.policy_version == 2 and not slot.is_moving)
    assert not engine.is_paused


async def test_an_engine_is_started_once_however_many_ask_and_leave(tmp_path: Path) -> None:
    engines = await Engines(tmp_path).open()
    engines.starter.goes_on.clear()
    for _ in range(3):  # a client that tries again and again
        impatient = engines.pin(5)
        await until(lambda: engines.starter.num_begun == 2)
        await leave(impatient)
    both = [engines.pin(5), engines.pin(5)]
    await asyncio.sleep(0)
    engines.starter.goes_on.set()
    one, other = await asyncio.gather(*both)
    assert one is other is engines.pool.slots[1]
    assert (engines.starter.num_begun, len(engines.pool.slots)) == (2, 2)


async def test_an_engine_is_not_taken_from_who_waits_for_it(tmp_path: Path) -> None:
    engines = await Engines(tmp_path).open()
    engines.starter.goes_on.clear()
    first, second = engines.pin(5), engines.pin(6)
    await until(lambda: engines.starter.num_begun == 2)
    engines.starter.goes_on.set()
    assert (await first).policy_version == 5
    with pytest.raises(ApiError) as busy:
        await second
    assert (busy.value.code, busy.value.retry_after_s) == ("engines_busy", 5.0)
    assert (await engines.pin(6)).policy_version == 6


async def test_a_move_waits_for_the_pin_whose_load_has_just_ended(tmp_path: Path) -> None:
    engines = await Engines(tmp_path).open()
    slot = await engines.pin(2)
    engine = engines.engine(1)

    async def pin_and_use() -> list[int]:
        taken = await engines.pool.exact(engines.weights(3), set, may_share_stable=False)
        with taken.busy(is_pinned=True):
            before = engine.policy_version
            await asyncio.sleep(3 * engine_pool.POLL_S)
            return [before, engine.policy_version]

    engine.goes_on.clear()
    using = asyncio.create_task(pin_and_use())
    await until(lambda: engine.is_paused)
    moving = asyncio.create_task(engines.pool.move(slot, engines.weights(8)))
    await asyncio.sleep(0)
    engine.goes_on.set()
    assert await using == [3, 3]
    await moving
    assert (slot.policy_version, engine.loaded) == (8, [2, 3, 8])


async def test_a_version_reserved_while_a_pin_waits_keeps_its_engine(tmp_path: Path) -> None:
    engines = await Engines(tmp_path, max_engines=3).open()
    await engines.pin(2)
    engines.starter.goes_on.clear()
    starting, waiting = engines.pin(5), engines.pin(6)
    await until(lambda: engines.starter.num_begun == 3)
    engines.reserved = {1, 2}
    engines.starter.goes_on.set()
    assert (await starting).policy_version == 5
    with pytest.raises(ApiError, match="all 3 engines"):
        await waiting
    assert engines.engine(1).loaded == [2]


async def test_a_failed_load_reaches_all_who_wait_and_the_next_one_tries_again(
    tmp_path: Path,
) -> None:
    engines = await Engines(tmp_path).open()
    slot = await engines.pin(2)
    engine = engines.engine(1)
    engine.is_finite = False
    for outcome in await asyncio.gather(engines.pin(3), engines.pin(3), return_exceptions=True):
        assert isinstance(outcome, BadWeightsError)
    assert (slot.policy_version, engine.policy_version) == (2, 2)
    engine.is_finite = True
    assert (await engines.pin(3)).policy_version == 3


async def test_what_an_engine_that_died_was_asked_is_no_fault_of_the_weights(
    tmp_path: Path,
) -> None:
    engines = await Engines(tmp_path).open()
    await engines.pin(2)
    engines.engine(1).is_finite, engines.engine(1).is_over = False, True
    with pytest.raises(engine_pool.StageError) as died:
        await engines.pin(3)
    assert not isinstance(died.value, BadWeightsError)
    assert len(engines.pool.slots) == 1
    assert (await engines.pin(3)).policy_version == 3


async def test_a_pool_that_closes_ends_what_it_began(tmp_path: Path) -> None:
    engines = await Engines(tmp_path).open()
    await engines.pin(2)
    engines.engine(1).goes_on.clear()
    waiting = engines.pin(3)
    await until(lambda: engines.engine(1).is_paused)
    await engines.pool.close()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert all(engine.is_over for engine in engines.starter.engines)
    assert engines.in_use == []
