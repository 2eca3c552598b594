"""The order in which a simulated step takes its groups in: `actors.intake`, by counting.

Invariant: same arrivals, same groups per step as the intake of a run; a test holds both to it. A
run looks at a few hundred groups, a simulation at millions: here an arrival costs a few steps,
whatever is under way. Called by `cluster.simulation`.
"""

from collections import Counter, defaultdict, deque
from typing import Protocol

from cluster.simulated_engine import Group

BATCHES_PER_STEP = 4  # as actors.intake


class Intake(Protocol):
    num_under_way: int  # drawn, neither taken nor dropped

    def draw(self, group: Group) -> None: ...
    def add(self, group: Group) -> None:
        """It is scored."""
        ...

    def drop(self, group: Group) -> None: ...
    def take(self) -> list[Group]:
        """The next batch for the learner, empty when it has to wait."""
        ...

    def begin(self, version: int) -> None:
        """A new step, by weights `version`."""
        ...


def intake_of(max_policy_age: int, num_groups: int) -> Intake:
    return WithinAge(max_policy_age, num_groups) if max_policy_age else InDrawOrder(num_groups)


class InDrawOrder:
    """`rollout.max_policy_age` 0: quarters of a step in the order of drawing."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = self._num_left = num_groups
        self._size = -(-num_groups // BATCHES_PER_STEP)
        self._drawn: deque[Group] = deque()
        self._ready: deque[Group] = deque()  # those that no unsettled draw precedes
        self.num_under_way = 0

    def draw(self, group: Group) -> None:
        self._drawn.append(group)
        self.num_under_way += 1

    def add(self, group: Group) -> None:
        group.fate = "ready"

    def drop(self, group: Group) -> None:
        group.fate = "settled"
        self.num_under_way -= 1

    def take(self) -> list[Group]:
        while self._drawn and self._drawn[0].fate != "running":
            group = self._drawn.popleft()
            if group.fate == "ready":
                self._ready.append(group)
        size = min(self._size, self._num_left)
        if len(self._ready) < size:
            return []
        self._num_left -= size
        self.num_under_way -= size
        return [self._ready.popleft() for _ in range(size)]

    def begin(self, version: int) -> None:
        del version
        self._num_left = self._num_groups


class WithinAge:
    """As they come, oldest first, with seats kept for those that would be too old in the next."""

    def __init__(self, max_policy_age: int, num_groups: int) -> None:
        self._max_policy_age = max_policy_age
        self._num_groups = self._num_left = num_groups
        self._due = -max_policy_age
        self._unused: Counter[int] = Counter()  # by version drawn at: under way
        self._waiting: defaultdict[int, deque[Group]] = defaultdict(deque)
        self.num_under_way = 0

    def draw(self, group: Group) -> None:
        self._unused[group.drawn_at] += 1
        self.num_under_way += 1

    def add(self, group: Group) -> None:
        self._waiting[group.drawn_at].append(group)

    def drop(self, group: Group) -> None:
        self._unused[group.drawn_at] -= 1
        self.num_under_way -= 1

    def take(self) -> list[Group]:
        batch: list[Group] = []
        for version in range(self._due, self._due + self._max_policy_age + 1):
            waiting = self._waiting[version]
            while waiting and self._has_seat(version):
                batch.append(waiting.popleft())
                self._unused[version] -= 1
                self._num_left -= 1
        self.num_under_way -= len(batch)
        return batch

    def begin(self, version: int) -> None:
        self._unused.pop(self._due, None)
        self._waiting.pop(self._due, None)
        self._due = version - self._max_policy_age
        self._num_left = self._num_groups

    def _has_seat(self, drawn_at: int) -> bool:
        num_left, num_older = self._num_left - 1, 0
        if num_left < 0:
            return False
        for version in range(self._due, drawn_at):
            num_older += self._unused[version]
            if num_left < num_older - (version - self._due) * self._num_groups:
                return False
        return True
