"""Sums and means of one step: counts and metrics of all micro-batches, reduced over ranks once.

Invariant: every rank adds the same keys (empty micro-batches add zeros), so one all-reduce of one
vector gives every rank the same totals, and with them the same decision to step or to skip. Of a
name that ends in `_max` the largest value is kept, by a second all-reduce, and no mean is made.
Numbers of Python stay on the host and tensors on their device until `reduce`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST = "_max"
_COUNT = " of"


class Mean(NamedTuple):
    """A sum, and how many it is of; both over one micro-batch, without gradient."""

    total: Tensor
    count: Tensor | int


class Totals(NamedTuple):
    """Over all micro-batches and ranks; a mean of nothing is left out."""

    sums: dict[str, float]
    means: dict[str, float]


class StepSums:
    """Adds up scalars by name without waiting for the device, until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor | float] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            term = value.to(self._device, torch.float64) if isinstance(value, Tensor) else value
            if name not in self._sums:
                self._sums[name] = term
            elif name.endswith(LARGEST):
                known = torch.as_tensor(self._sums[name], dtype=torch.float64)
                self._sums[name] = torch.maximum(known, torch.as_tensor(term, dtype=torch.float64))
            else:
                self._sums[name] = self._sums[name] + term

    def add_means(self, values: Mapping[str, Mean]) -> None:
        self.add({name: mean.total for name, mean in values.items()})
        self.add({name + _COUNT: mean.count for name, mean in values.items()})

    def reduce(self) -> Totals:
        """Totals over all ranks; starts over from zero."""
        totals: dict[str, float] = {}
        for is_largest, operation in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
            names = sorted(name for name in self._sums if name.endswith(LARGEST) is is_largest)
            if names:
                vector = self._vector(names)
                dist.all_reduce(vector, op=operation)
                totals |= zip(names, vector.tolist(), strict=True)
        self._sums = {}
        counts = {name: totals.pop(name) for name in [*totals] if name.endswith(_COUNT)}
        sums = {name: value for name, value in totals.items() if name + _COUNT not in counts}
        means = {
            name: totals[name] / (1.0 if name.endswith(LARGEST) else count)
            for key, count in counts.items()
            if count > 0 and (name := key.removesuffix(_COUNT))
        }
        return Totals(sums, means)

    def _vector(self, names: list[str]) -> Tensor:
        """The sums of `names` on the device: one copy for all that are numbers of the host."""
        values = [self._sums[name] for name in names]
        numbers = [0.0 if isinstance(value, Tensor) else value for value in values]
        vector = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        if places:
            vector[places] = torch.stack([value for value in values if isinstance(value, Tensor)])
        return vector
