"""Sums of one step: counts and metrics of all micro-batches, reduced over ranks once.

Invariant: every rank adds the same keys (empty micro-batches add zeros), so one all-reduce of one
vector gives every rank the same totals, and with them the same decision to step or to skip. Of a
name that ends in `_max` the largest value is kept, by a second all-reduce.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST = "_max"


class StepSums:
    """Adds up scalars by name without waiting for the device, until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            term = torch.as_tensor(value, dtype=torch.float64, device=self._device)
            if name in self._sums:
                join = torch.maximum if name.endswith(LARGEST) else torch.add
                term = join(self._sums[name], term)
            self._sums[name] = term

    def reduce(self) -> dict[str, float]:
        """Totals over all ranks; starts over from zero."""
        totals: dict[str, float] = {}
        for is_largest, operation in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
            names = sorted(name for name in self._sums if name.endswith(LARGEST) is is_largest)
            if names:
                vector = torch.stack([self._sums[name] for name in names])
                dist.all_reduce(vector, op=operation)
                totals |= zip(names, vector.tolist(), strict=True)
        self._sums = {}
        return totals
