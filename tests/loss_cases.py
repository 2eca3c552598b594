"""Rows and outputs of known numbers, for the tests of losses."""

from dataclasses import replace

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
    proximal: list[float] | None = None,
    sampled: list[float] | None = None,
) -> MicroBatch:
    """Sequences of one context token and as many loss tokens as they have advantages.

    `sampled` [N] are the proximal log-probs given the hint, by default those of the rollout.
    """
    rollout = rollout_logprobs or [[0.0] * len(values) for values in advantages]
    rows = MicroBatch.pack(
        [
            Row(
                context=np.zeros(1, dtype=np.int32),
                completion=np.arange(len(values), dtype=np.int32),
                loss_mask=np.ones(len(values), dtype=bool),
                rollout_logprobs=np.array(rollout[i], dtype=np.float32),
                advantages=np.array(values, dtype=np.float32),
                is_truncated=bool(truncated and truncated[i]),
                sampled_context=np.zeros(2, dtype=np.int32) if guided and guided[i] else None,
                policy_age=np.full(len(values), ages[i] if ages else 0.0, dtype=np.float32),
            )
            for i, values in enumerate(advantages)
        ]
    )
    return replace(
        rows,
        proximal_logprobs=None if proximal is None else torch.tensor(proximal),
        sampled_logprobs=rows.rollout_logprobs if sampled is None else torch.tensor(sampled),
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
