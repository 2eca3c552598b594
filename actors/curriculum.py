"""Which task comes next, and what the results say about the tasks.

Invariant: the order of tasks depends only on the seed and the number drawn, and a draw is pending
until its group was consumed or dropped: a resumed run draws the pending ones again, then goes on
where it stopped. Every pass over the taskset is a new permutation. Called by the controller.
"""

import math
import random
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import takewhile

from actors.prefix_length import PrefixLength
from actors.rollout import RolloutRequest, Sampling
from cluster.errors import StageError
from cluster.run_state import CurriculumState
from cluster.types import Passes, Task

WINDOW = 256  # groups
MAX_EMPTY_WINDOWS = 4


class Curriculum:
    """Seeded sampler over a taskset plus the gate that notices when nothing can be learned."""

    def __init__(
        self,
        tasks: list[Task],
        seed: int,
        sampling: Sampling,
        group_size: int,
        prefix: PrefixLength | None = None,
        is_seeded: bool = True,
    ) -> None:
        self._tasks = tasks
        self._seed = seed
        self._sampling = sampling
        self._group_size = group_size
        self._prefix = prefix
        self._is_seeded = is_seeded
        self._num_drawn = 0
        self._pending: dict[str, int] = {}  # group_id -> draw
        self._drawn_at: dict[str, int] = {}  # group_id -> policy version
        self._again: deque[int] = deque()
        self._held: set[str] = set()  # groups in the buffer since before the last restart
        self._early: set[str] = set()
        self._order: list[int] = []
        self._order_epoch = -1
        self._num_uniform_in_a_row = 0

    def next(self, policy_version: int = 0) -> RolloutRequest:
        """The next group to produce, by weights `policy_version` or newer. Its id names epoch and
        task, so a retry is a duplicate.
        """
        while (request := self._draw()).group_id in self._early:
            self._early.remove(request.group_id)
            del self._pending[request.group_id]
        at = self._drawn_at.get(request.group_id, policy_version)
        self._drawn_at[request.group_id] = min(at, policy_version)
        return request

    def drawn_at(self, group_id: str) -> float:
        """The policy version when this group was drawn, or sampled if the buffer held it since
        before the last restart; infinity for one that was not.
        """
        return self._drawn_at.get(group_id, math.inf)

    def drawn_by(self, policy_version: int) -> set[str]:
        """Unsettled groups that were drawn when the weights had at most `policy_version`."""
        return {group_id for group_id, at in self._drawn_at.items() if at <= policy_version}

    def _draw(self) -> RolloutRequest:
        if self._again:
            draw = self._again.popleft()
        else:
            draw = self._num_drawn
            self._num_drawn += 1
        epoch, position = divmod(draw, len(self._tasks))
        if epoch != self._order_epoch:
            self._order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._order_epoch = epoch
        task = self._tasks[self._order[position]]
        group_id = f"{epoch}-{task.task_id}"
        self._pending[group_id] = draw
        seed = random.Random(f"{self._seed}/{epoch}/{task.task_id}").getrandbits(31)
        sampling = replace(self._sampling, seed=seed if self._is_seeded else None)
        prefix_tokens = self._prefix.tokens if self._prefix else 0
        return RolloutRequest(
            group_id, task, self._group_size, sampling, prefix_tokens=prefix_tokens
        )

    @property
    def unsettled(self) -> set[str]:
        """Groups that were drawn or held, and neither consumed nor dropped since."""
        return self._pending.keys() | self._held

    def is_held(self, group_id: str) -> bool:
        """Whether the buffer has held this group since before the last restart."""
        return group_id in self._held

    def is_expected(self, group_id: str) -> bool:
        """Whether this group was drawn or held, and neither consumed nor dropped since."""
        return group_id in self._pending or group_id in self._held

    def settle(self, group_ids: list[str]) -> int:
        """These groups were consumed or dropped: their draws are done; returns how many were
        pending, each of which has a slot.
        """
        known = [group_id for group_id in group_ids if group_id in self._pending]
        for group_id in known:
            del self._pending[group_id]
        for group_id in group_ids:
            self._drawn_at.pop(group_id, None)
        self._early |= (set(group_ids) - set(known)) & self._held
        self._held -= set(group_ids)
        return len(known)

    def in_order(self, group_ids: set[str]) -> list[str]:
        """The longest run of `group_ids`, as they were drawn, that no unsettled draw can precede.

        With draws a, b, c pending: `in_order({"a", "c"}) == ["a"]`.
        """
        order = sorted(self._pending, key=self._pending.__getitem__)
        return list(takewhile(group_ids.__contains__, order))

    def observe(self, is_uniform: bool, mean_reward: float) -> None:
        """Count a scored group; `StageError` when nothing but equal rewards has come for long."""
        self._num_uniform_in_a_row = self._num_uniform_in_a_row + 1 if is_uniform else 0
        if self._num_uniform_in_a_row >= WINDOW * MAX_EMPTY_WINDOWS:
            side = "never" if mean_reward <= 0 else "always"
            raise StageError(
                "dispatch",
                f"the last {self._num_uniform_in_a_row} groups had equal rewards (the policy is "
                f"{side} rewarded): nothing to learn from; change tasks.train, raise "
                "rollout.group_size or rollout.temperature, or warm-start longer",
            )

    def note_passes(self, passes: Passes) -> None:
        """Of a scored group that is dropped now."""
        if self._prefix:
            self._prefix.settle(passes)

    def end_step(self, consumed: Iterable[Passes]) -> None:
        """An optimizer step has consumed these groups; later draws may differ by their results."""
        if self._prefix:
            for passes in consumed:
                self._prefix.settle(passes)
            self._prefix.end_step()

    def state(self) -> CurriculumState:
        return CurriculumState(
            num_drawn=self._num_drawn,
            pending=sorted([*self._pending.values(), *self._again]),
            early=sorted(self._early),
            prefix=self._prefix.state() if self._prefix else None,
        )

    def restore(self, state: CurriculumState, held: Mapping[str, int] | None = None) -> None:
        """Go back to `state`, with the groups `held` in the buffer already, by the policy version
        that sampled them.
        """
        self._num_drawn = state.num_drawn
        self._again = deque(state.pending)
        self._pending, self._drawn_at = {}, dict(held or {})
        self._early, self._held = set(state.early), set(self._drawn_at)
        if self._prefix:
            self._prefix.restore(state.prefix)
        self._num_uniform_in_a_row = 0
