"""How long the ranks work on a step, and how long the step is.

Invariant: work is gradients and the update, waits for other ranks in their collectives included;
what a rank does for others besides (exports, probes, saves) is not. Owned by the learner.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from learners.step_sums import StepSums


class StepClock:
    """Of one rank. `end_step` is collective, `working` is not."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._ended: float | None = None  # the step before

    @contextmanager
    def working(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._busy_s += time.perf_counter() - started

    def reset(self) -> None:
        """The step in hand is given up."""
        self._busy_s, self._ended = 0.0, None

    def end_step(self) -> tuple[float, float | None]:
        """Mean seconds of work of the ranks, and their share of the time since the last step ended;
        None where there is no step before.
        """
        sums = StepSums(torch.device("cpu"))
        sums.add({"busy_s": self._busy_s})
        busy_s = sums.reduce().sums["busy_s"] / dist.get_world_size()
        now, before = time.perf_counter(), self._ended
        self._busy_s, self._ended = 0.0, now
        return busy_s, None if before is None else busy_s / (now - before)
