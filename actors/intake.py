"""In which order the learner takes in the groups of a step.

Invariant: every group that was claimed is handed out once, however often the buffer delivers it (a
lease can run out while its group waits here). In `sync` mode (`rollout.max_policy_age` 0) groups
are handed out in the order they were drawn, in batches of fixed size, so that the sum of their
gradients has one order of summation and a repeated step gives the same bits. Otherwise they are
handed out as they come. Owned by the controller.
"""

from typing import Protocol

from actors.curriculum import Curriculum
from cluster.types import GroupHeader

BATCHES_PER_STEP = 4  # in draw order: the learner works beside the rollouts of three quarters


class Intake(Protocol):
    """Of one step. `offer` gets what was claimed and returns the batches to take in now."""

    @property
    def claimed(self) -> list[GroupHeader]: ...

    def offer(self, headers: list[GroupHeader]) -> list[list[GroupHeader]]: ...

    def forget(self, group_ids: list[str]) -> None:
        """These groups turned out to be lost: the step needs others."""
        ...


class AsTheyCome:
    """Every claim is a batch: micro-batches start at once."""

    def __init__(self) -> None:
        self._claimed: dict[str, GroupHeader] = {}

    @property
    def claimed(self) -> list[GroupHeader]:
        return list(self._claimed.values())

    def offer(self, headers: list[GroupHeader]) -> list[list[GroupHeader]]:
        new = {h.group_id: h for h in headers if h.group_id not in self._claimed}
        self._claimed |= new
        return [list(new.values())] if new else []

    def forget(self, group_ids: list[str]) -> None:
        for group_id in group_ids:
            self._claimed.pop(group_id, None)


class InDrawOrder:
    """Batches of `num_groups / 4` groups, each when all that were drawn before are in or dropped.

    Example: of 4 groups a step, the second drawn waits for the first even if it was ready sooner.
    """

    def __init__(self, curriculum: Curriculum, num_groups: int) -> None:
        self._curriculum = curriculum
        self._num_groups = num_groups
        self._size = -(-num_groups // BATCHES_PER_STEP)
        self._claimed: dict[str, GroupHeader] = {}
        self._taken: set[str] = set()

    @property
    def claimed(self) -> list[GroupHeader]:
        """In the order of drawing once the step is complete."""
        order = self._curriculum.in_order(set(self._claimed))
        rest = [group_id for group_id in self._claimed if group_id not in order]
        return [self._claimed[group_id] for group_id in (*order, *rest)]

    def offer(self, headers: list[GroupHeader]) -> list[list[GroupHeader]]:
        self._claimed |= {h.group_id: h for h in headers if h.group_id not in self._claimed}
        order = self._curriculum.in_order(set(self._claimed))
        waiting = [group_id for group_id in order if group_id not in self._taken]
        is_last = len(order) == self._num_groups
        batches: list[list[GroupHeader]] = []
        while len(waiting) >= self._size or (waiting and is_last):
            batch, waiting = waiting[: self._size], waiting[self._size :]
            batches.append([self._claimed[group_id] for group_id in batch])
            self._taken |= set(batch)
        return batches

    def forget(self, group_ids: list[str]) -> None:
        for group_id in group_ids:
            self._claimed.pop(group_id, None)
            self._taken.discard(group_id)
