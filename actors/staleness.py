"""How far rollouts may run ahead of the learner, as a number of slots.

Invariant: at most `capacity` groups are between admission and the moment the engines hold the
weights they trained. With `capacity = (max_policy_age + 1) * groups_per_step`, and seats that
`actors.intake` keeps for those that others overtook, none is older than `max_policy_age`. Used by
the controller's dispatch loop.
"""

import asyncio


class StalenessPolicy:
    """Slots for groups. Example: age 0 and 16 groups a step give 16 slots, freed only after each
    sync.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._free = capacity
        self._changed = asyncio.Condition()

    async def reset(self) -> None:
        """All slots are free again: nothing that was admitted before counts any more."""
        async with self._changed:
            self._free = self._capacity
            self._changed.notify_all()

    async def admit(self) -> None:
        """Wait for a slot and take it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free > 0)
            self._free -= 1

    async def release(self, num_groups: int) -> None:
        """Give slots back: after the sync for consumed groups, at once for dropped ones."""
        async with self._changed:
            self._free += num_groups
            self._changed.notify_all()
