"""Rows and outputs of known numbers, for the tests of losses."""

import numpy as np
import torch
from torch import Tensor

from learners.batch import MicroBatch, Row
from learners.logprobs import TokenOutputs


def rows_of(
    advantages: list[list[float]],
    rollout_logprobs: list[list[float]] | None = None,
    guided: list[bool] | None = None,
    ages: list[float] | None = None,
    truncated: list[bool] | None = None,
) -> MicroBatch:
    """Sequences of one context token and as many loss tokens as they have advantages."""
    rollout = rollout_logprobs or [[0.0] * len(values) for values in advantages]
    return MicroBatch.pack(
        [
            Row(
                context=np.zeros(1, dtype=np.int32),
                completion=np.arange(len(values), dtype=np.int32),
                loss_mask=np.ones(len(values), dtype=bool),
                rollout_logprobs=np.array(rollout[i], dtype=np.float32),
                advantages=np.array(values, dtype=np.float32),
                is_guided=bool(guided and guided[i]),
                is_truncated=bool(truncated and truncated[i]),
                policy_age=np.full(len(values), ages[i] if ages else 0.0, dtype=np.float32),
            )
            for i, values in enumerate(advantages)
        ]
    )


def outputs_of(
    logprobs: list[float],
    entropy: list[float] | None = None,
    nucleus_entropy: list[float] | None = None,
) -> TokenOutputs:
    """Float64 leaves that collect gradients."""

    def leaf(values: list[float] | None) -> Tensor:
        numbers = [0.0] * len(logprobs) if values is None else values
        return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)

    return TokenOutputs(leaf(logprobs), leaf(entropy), leaf(nucleus_entropy))


def gradient(leaf: Tensor) -> list[float]:
    assert leaf.grad is not None
    return leaf.grad.tolist()
