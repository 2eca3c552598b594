"""A vLLM engine as the simulation sees it: sequences that share iterations.

Invariant: every running sequence gets one token an iteration, and an iteration with B of them
takes `iteration_s + B * sequence_s` (reading the weights once, and work per sequence); what exceeds
`max_running` waits its turn. Called by `cluster.simulation`.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.stage_profile import StageProfile

ROUNDING = 1e-6  # of an iteration


@dataclass(eq=False, slots=True)
class Group:
    """`num_running` counts the trajectories that are not finished; `drawn_at` is a version."""

    num_tokens: int
    num_running: int
    drawn_at: int
    fate: str = "running"  # running, ready, settled


class Engine:
    """Counts iterations; a sequence of L tokens that begins at count c ends at c + L."""

    def __init__(self, profile: StageProfile) -> None:
        self._profile = profile
        self._count = 0.0
        self._updated_at = 0.0
        self._ends: list[tuple[float, int, Group]] = []  # heap
        self._queue: deque[tuple[int, Group]] = deque()
        self._serial = itertools.count()
        self._is_paused = False
        self.num_groups = 0
        self.busy_s = 0.0
        self.plan = 0  # of the next end; the run voids it when the load changes

    @property
    def _iteration_s(self) -> float:
        return self._profile.iteration_s + self._profile.sequence_s * len(self._ends)

    def advance(self, now: float) -> None:
        """Account for the time since the last change."""
        elapsed, self._updated_at = now - self._updated_at, now
        if self._ends:
            self.busy_s += elapsed
            if not self._is_paused:
                self._count += elapsed / self._iteration_s

    def add(self, group: Group, lengths: Sequence[int], now: float) -> None:
        self.advance(now)
        self.num_groups += 1
        self._queue.extend((length, group) for length in lengths)
        self._fill()

    def due_s(self) -> float | None:
        """Seconds to the next end of a sequence if nothing changes; None without one."""
        if self._is_paused or not self._ends:
            return None
        return max(0.0, self._ends[0][0] - self._count) * self._iteration_s

    def finish(self, now: float) -> list[Group]:
        """The groups whose last sequence has ended by now."""
        self.advance(now)
        finished: list[Group] = []
        while self._ends and self._ends[0][0] <= self._count + ROUNDING:
            _, _, group = heapq.heappop(self._ends)
            group.num_running -= 1
            if group.num_running == 0:
                self.num_groups -= 1
                finished.append(group)
        self._fill()
        return finished

    def pause(self, now: float) -> None:
        self.advance(now)
        self._is_paused = True
        self.plan += 1

    def resume(self, now: float) -> None:
        self.advance(now)
        self._is_paused = False

    def _fill(self) -> None:
        while self._queue and len(self._ends) < self._profile.max_running:
            length, group = self._queue.popleft()
            heapq.heappush(self._ends, (self._count + length, next(self._serial), group))
