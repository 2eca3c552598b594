"""Which task comes next, and what the results say about the tasks.

Invariant: the order of tasks depends only on the seed and the number drawn, and a draw is pending
until its group was consumed or dropped: a resumed run draws the pending ones again, then goes on
where it stopped. Every pass over the taskset is a new permutation. Called by the controller.
"""

import random
from collections import deque

from actors.rollout import RolloutRequest, Sampling
from cluster.errors import StageError
from cluster.types import CurriculumState, Task

WINDOW = 256  # groups
MAX_EMPTY_WINDOWS = 4


class Curriculum:
    """Seeded sampler over a taskset plus the gate that notices when nothing can be learned."""

    def __init__(self, tasks: list[Task], seed: int, sampling: Sampling, group_size: int) -> None:
        self._tasks = tasks
        self._seed = seed
        self._sampling = sampling
        self._group_size = group_size
        self._num_drawn = 0
        self._pending: dict[str, int] = {}  # group_id -> draw
        self._again: deque[int] = deque()
        self._order: list[int] = []
        self._order_epoch = -1
        self._num_uniform_in_a_row = 0

    def next(self) -> RolloutRequest:
        """The next group to produce. Its id names epoch and task, so a retry is a duplicate."""
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
        sampling = Sampling(
            max_new_tokens=self._sampling.max_new_tokens,
            temperature=self._sampling.temperature,
            stop_token_ids=self._sampling.stop_token_ids,
            seed=random.Random(f"{self._seed}/{epoch}/{task.task_id}").getrandbits(31),
        )
        return RolloutRequest(group_id, task, self._group_size, sampling)

    def settle(self, group_ids: list[str]) -> None:
        """These groups were consumed or dropped: their draws are done."""
        for group_id in group_ids:
            self._pending.pop(group_id, None)

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

    def state(self) -> CurriculumState:
        return CurriculumState(num_drawn=self._num_drawn, pending=sorted(self._pending.values()))

    def restore(self, state: CurriculumState) -> None:
        self._num_drawn = state.num_drawn
        self._again = deque(state.pending)
