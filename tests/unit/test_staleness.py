"""Slots: the bound on policy age."""

import asyncio

import pytest

from actors.staleness import StalenessPolicy


async def test_admits_exactly_the_capacity_until_slots_come_back() -> None:
    slots = StalenessPolicy(3)
    for _ in range(3):
        await asyncio.wait_for(slots.admit(), 1.0)
    fourth = asyncio.create_task(slots.admit())
    await asyncio.sleep(0.01)
    assert not fourth.done()
    await slots.release(1)
    await asyncio.wait_for(fourth, 1.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(slots.admit(), 0.01)


async def test_in_order_of_admission_no_group_is_older_than_the_bound() -> None:
    groups_per_step, max_policy_age, steps = 4, 2, 30
    slots = StalenessPolicy((max_policy_age + 1) * groups_per_step)
    version, ages = 0, []
    admitted: asyncio.Queue[int] = asyncio.Queue()

    async def dispatch() -> None:
        while True:
            await slots.admit()
            admitted.put_nowait(version)

    dispatcher = asyncio.create_task(dispatch())
    for _ in range(steps):
        born = [await asyncio.wait_for(admitted.get(), 5.0) for _ in range(groups_per_step)]
        ages += [version - b for b in born]
        version += 1
        await slots.release(groups_per_step)
        await asyncio.sleep(0)
    dispatcher.cancel()
    assert max(ages) == max_policy_age  # the bound holds and is used
