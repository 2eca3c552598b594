"""In which order the learner takes in the groups of a step.

Invariant: every group that was claimed is handed out once, however often the buffer delivers it (a
lease can run out while its group waits here). In `sync` mode (`rollout.max_policy_age` 0) groups
are handed out in the order they were drawn, in batches of fixed size, so that the sum of their
gradients has one order of summation and a repeated step gives the same bits. Otherwise they are
handed out as they come, except that the step waits for those it would make too old: short rollouts
may overtake long ones, but never push them out. Owned by the controller.
"""

from typing import Protocol

from actors.curriculum import Curriculum
from cluster.types import GroupHeader

BATCHES_PER_STEP = 4  # in draw order: the learner works beside the rollouts of three quarters


class Intake(Protocol):
    """Of one step. `offer` gets what was claimed and returns the batches to take in now."""

    @property
    def claimed(self) -> list[GroupHeader]:
        """The groups of the step so far: those that were handed out."""
        ...

    @property
    def waiting(self) -> list[GroupHeader]:
        """Delivered, and not handed out: a step that is complete leaves them."""
        ...

    @property
    def strays(self) -> list[str]:
        """Delivered and not handed out, but dropped by the run meanwhile: to be forgotten."""
        ...

    def offer(self, headers: list[GroupHeader]) -> list[list[GroupHeader]]: ...

    def forget(self, group_ids: list[str]) -> None:
        """These groups turned out to be lost: the step needs others."""
        ...


class WithinAge:
    """As they come, by priority (`buffer.policy`) and then oldest first, with seats kept so that no
    group will ever be too old.

    Groups drawn at version `due` must be used in this step, at `due + 1` in the next at the latest,
    and so on: a younger one is taken in only if the seats left suffice for what that leaves to this
    step. Since at most `max_policy_age + 1` steps of groups are under way, that always works out.
    `waiting` are groups that the step before has left over. With two groups a step, of which the
    long `a` is due, `b` is taken in and `c` waits for the next step until `a` has come.
    """

    def __init__(
        self, curriculum: Curriculum, num_groups: int, due: int, waiting: list[GroupHeader]
    ) -> None:
        self._curriculum = curriculum
        self._num_groups = num_groups
        self._due = due
        self._waiting = {header.group_id: header for header in waiting}
        self._claimed: dict[str, GroupHeader] = {}

    @property
    def claimed(self) -> list[GroupHeader]:
        return list(self._claimed.values())

    @property
    def waiting(self) -> list[GroupHeader]:
        return list(self._waiting.values())

    @property
    def strays(self) -> list[str]:
        return [g for g in self._waiting if not self._curriculum.is_expected(g)]

    def offer(self, headers: list[GroupHeader]) -> list[list[GroupHeader]]:
        self._waiting |= {h.group_id: h for h in headers if h.group_id not in self._claimed}
        batch: list[GroupHeader] = []
        for header in sorted(self._waiting.values(), key=self._rank):
            if self._has_seat(self._drawn_at(header)):
                self._claimed[header.group_id] = self._waiting.pop(header.group_id)
                batch.append(header)
        return [batch] if batch else []

    def forget(self, group_ids: list[str]) -> None:
        for group_id in group_ids:
            self._claimed.pop(group_id, None)
            self._waiting.pop(group_id, None)

    def _rank(self, header: GroupHeader) -> tuple[float, int]:
        return -header.priority, self._drawn_at(header)

    def _drawn_at(self, header: GroupHeader) -> int:
        drawn_at = self._curriculum.drawn_at(header.group_id)
        return int(min(drawn_at, header.min_policy_version))

    def _has_seat(self, drawn_at: int) -> bool:
        """Whether the step can do without this seat for all groups drawn at an older version."""
        num_left = self._num_groups - len(self._claimed) - 1
        return num_left >= 0 and all(
            num_left >= self._num_needed(version) for version in range(self._due, drawn_at)
        )

    def _num_needed(self, version: int) -> int:
        """Seats of this step for groups drawn at `version` or before; later steps have the rest."""
        unused = self._curriculum.drawn_by(version) - self._claimed.keys()
        return len(unused) - (version - self._due) * self._num_groups


class InDrawOrder:
    """`num_batches` batches of groups, each when all that were drawn before are in or dropped.

    A group that the buffer has held since before a restart waits until it is drawn again, and is no
    part of a step that is complete without it. Example: of 4 groups a step, the second drawn waits
    for the first even if it was ready sooner.
    """

    def __init__(
        self, curriculum: Curriculum, num_groups: int, num_batches: int = BATCHES_PER_STEP
    ) -> None:
        self._curriculum = curriculum
        self._num_groups = num_groups
        self._size = -(-num_groups // num_batches)
        self._waiting: dict[str, GroupHeader] = {}
        self._taken: dict[str, GroupHeader] = {}

    @property
    def claimed(self) -> list[GroupHeader]:
        """In the order of drawing."""
        return list(self._taken.values())

    @property
    def waiting(self) -> list[GroupHeader]:
        return list(self._waiting.values())

    @property
    def strays(self) -> list[str]:
        return [g for g in self._waiting if not self._curriculum.is_expected(g)]

    def offer(self, headers: list[GroupHeader]) -> list[list[GroupHeader]]:
        self._waiting |= {h.group_id: h for h in headers if h.group_id not in self._taken}
        num_left = self._num_groups - len(self._taken)
        order = self._curriculum.in_order(self._waiting.keys() | self._taken.keys())
        ready = [group_id for group_id in order if group_id in self._waiting][:num_left]
        is_last = len(ready) == num_left
        batches: list[list[GroupHeader]] = []
        while len(ready) >= self._size or (ready and is_last):
            batch, ready = ready[: self._size], ready[self._size :]
            batches.append([self._waiting.pop(group_id) for group_id in batch])
            self._taken |= {header.group_id: header for header in batches[-1]}
        return batches

    def forget(self, group_ids: list[str]) -> None:
        for group_id in group_ids:
            self._waiting.pop(group_id, None)
            self._taken.pop(group_id, None)
