"""Sums of one step: counts and metrics of all micro-batches, reduced over ranks once.

Invariant: every rank adds the same keys (empty micro-batches add zeros), so one all-reduce of one
vector gives every rank the same totals, and with them the same decision to step or to skip.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class StepSums:
    """Adds up scalars by name without waiting for the device, until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            term = torch.as_tensor(value, dtype=torch.float64, device=self._device)
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def reduce(self) -> dict[str, float]:
        """Totals over all ranks; starts over from zero."""
        names = sorted(self._sums)
        vector = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(vector)
        self._sums = {}
        return dict(zip(names, vector.tolist(), strict=True))
