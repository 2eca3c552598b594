"""What counts as the engine's time: its waits, not its client's."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from serve.engine_time import EngineTime

WAIT_S = 0.03


async def engine(count: int, *, is_hung: bool = False) -> AsyncGenerator[str]:
    for number in range(count):
        await asyncio.sleep(WAIT_S)
        yield str(number)
    if is_hung:
        await asyncio.Event().wait()


async def test_a_client_that_reads_slowly_adds_nothing() -> None:
    clock = EngineTime()
    assert await clock.wait_for(asyncio.sleep(WAIT_S, "first")) == "first"
    read: list[str] = []
    async for event in clock.timed(engine(3)):
        read.append(event)
        await asyncio.sleep(10 * WAIT_S)
    assert read == ["0", "1", "2"]
    assert 4 * WAIT_S <= clock.total_s + 0.01 < 20 * WAIT_S
    assert not clock.is_waiting


async def test_an_engine_that_hangs_is_told_from_a_client_that_does_not_read() -> None:
    hung, slow, dead = EngineTime(), EngineTime(), EngineTime()

    async def consume(clock: EngineTime, events: AsyncGenerator[str], pause_s: float) -> None:
        async for _ in clock.timed(events):
            await asyncio.sleep(pause_s)

    for clock, events, pause_s in ((hung, engine(2, is_hung=True), 0), (slow, engine(9), 60)):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30 * WAIT_S):
                await consume(clock, events, pause_s)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            await dead.wait_for(asyncio.Event().wait())
    assert (hung.is_waiting, slow.is_waiting, dead.is_waiting) == (True, False, True)


async def test_a_stream_that_is_left_ends_the_engine_side() -> None:
    events = engine(9)
    timed = EngineTime().timed(events)
    assert await anext(timed) == "0"
    await timed.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(events)
