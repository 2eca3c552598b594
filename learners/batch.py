"""Packed rows: what one forward and backward pass of the learner reads.

Invariant: sequences lie end to end in [T] token arrays, and everything a loss needs lies in [N]
arrays with one entry per token that the policy wrote; a token without gradient has no entry, so no
loss needs a mask. Built by the learner and warm start from trajectories, examples and probes.
"""

# ruff: noqa: F722 (shapes in annotations)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cluster.types import GUIDED, Trajectory, TrajectoryGroup, TrajectoryStatus
from learners.packing import TrajectoryRef


@dataclass(frozen=True)
class Row:
    """One sequence on its way into a pack: `context` [C], `completion` [L], its columns [L]."""

    context: np.ndarray
    completion: np.ndarray
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    advantages: np.ndarray
    temperature: float = 1.0
    policy_age: np.ndarray | None = None  # [L] versions between sampling and now; None is 0
    is_truncated: bool = False  # ended by the token limit
    sampled_context: np.ndarray | None = None  # [C'] if sampled from another one: a guided row
    is_hinted: bool = False  # sampled with a hint, which may still be in what the learner sees
    num_given: int = 0  # first tokens that no policy sampled

    def __post_init__(self) -> None:
        if len(self.context) == 0 and self.loss_mask[:1].any():
            raise ValueError("a sequence must have a context: its first token has no predictor")

    @property
    def is_guided(self) -> bool:
        return self.sampled_context is not None

    @classmethod
    def of(cls, trajectory: Trajectory, advantages: np.ndarray, policy_version: int = 0) -> "Row":
        """A trajectory with its credit, about to train weights `policy_version`; it is conditioned
        on `train_context_tokens` when set.
        """
        context = trajectory.train_context_tokens
        age = np.zeros(len(trajectory.token_ids), dtype=np.float32)
        for span in trajectory.version_spans:
            age[span.start : span.end] = max(0, policy_version - span.policy_version)
        return cls(
            context=trajectory.context_tokens if context is None else context,
            completion=trajectory.token_ids,
            loss_mask=trajectory.loss_mask,
            rollout_logprobs=trajectory.rollout_logprobs,
            advantages=advantages,
            temperature=trajectory.temperature,
            policy_age=age,
            is_truncated=trajectory.status is TrajectoryStatus.TRUNCATED,
            sampled_context=None if context is None else trajectory.context_tokens,
            is_hinted=trajectory.arm == GUIDED,
            num_given=trajectory.num_given,
        )

    @classmethod
    def chosen(
        cls,
        refs: Sequence[TrajectoryRef],
        credited: Mapping[str, tuple[TrajectoryGroup, Sequence[np.ndarray | None]]],
        policy_version: int,
    ) -> "list[Row]":
        """Rows of those `refs` that have a credit and a token to learn from; `credited` holds each
        group with the advantages of its trajectories.
        """
        pairs = [(credited[ref.group_id], ref.index) for ref in refs]
        return [
            cls.of(group.trajectories[index], advantages, policy_version)
            for (group, credit), index in pairs
            if (advantages := credit[index]) is not None
            and group.trajectories[index].num_loss_tokens > 0
        ]

    @classmethod
    def plain(cls, context: np.ndarray, completion: np.ndarray) -> "Row":
        """A sequence whose whole completion counts and that has no rollout behind it."""
        zeros = np.zeros(len(completion), dtype=np.float32)
        return cls(context, completion, np.ones(len(completion), dtype=bool), zeros, zeros)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences end to end. T tokens, S sequences, N loss tokens (the ones the policy wrote).

    `loss_index` is the position whose hidden state predicts the loss token `labels`. Two sequences
    of 3 + 2 and 2 + 1 tokens: T = 8, cu_seqlens = [0, 5, 8], loss_index = [2, 3, 6], N = 3. A pack
    of no rows holds one token and N = 0, so that its pass runs the same collectives as everyone
    else's.
    """

    token_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]
    cu_seqlens: Int[Tensor, " S+1"]
    lengths: Sequence[int]  # S, where they can be read without waiting for the device
    loss_index: Int[Tensor, " N"]
    labels: Int[Tensor, " N"]
    sequence_ids: Int[Tensor, " N"]
    temperature: Float[Tensor, " N"]
    rollout_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    sequence_loss_tokens: Int[Tensor, " S"]
    policy_age: Float[Tensor, " N"]
    is_guided: Bool[Tensor, " N"]  # sampled in another context than the learner sees, or given
    is_given: Bool[Tensor, " N"]  # sampled by no policy: `rollout_logprobs` 0
    is_hinted: Bool[Tensor, " N"]  # these, and those that still have their hint
    is_truncated: Bool[Tensor, " N"]
    num_tokens: int
    num_sequences: int  # with at least one loss token
    proximal_logprobs: Float[Tensor, " N"] | None = None  # None: those of the present learner
    is_later_update: bool = False  # of its step, so that the present learner is not the proximal
    ref_logprobs: Float[Tensor, " N"] | None = None
    sampled_logprobs: Float[Tensor, " N"] | None = None  # proximal, given `Row.sampled_context`
    values: Float[Tensor, " N"] | None = None  # of the critic before the step
    returns: Float[Tensor, " N"] | None = None  # what the critic should have said

    @property
    def num_loss_tokens(self) -> int:
        return len(self.labels)

    @classmethod
    def pack(cls, rows: list[Row], device: torch.device | None = None) -> "MicroBatch":
        """Lay `rows` end to end on `device`."""
        num_tokens = sum(len(row.context) + len(row.completion) for row in rows)
        rows = rows or [Row.plain(np.zeros(1, dtype=np.int32), np.zeros(0, dtype=np.int32))]
        lengths = [len(row.context) + len(row.completion) for row in rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        written = [np.flatnonzero(row.loss_mask) for row in rows]
        counts = np.array([len(indices) for indices in written])

        def put(values: np.ndarray, dtype: torch.dtype = torch.long) -> Tensor:
            tensor = torch.as_tensor(values).to(dtype)
            if device is None or device.type == "cpu":
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        def repeated(values: list[float] | list[bool]) -> np.ndarray:
            return np.repeat(np.array(values), counts)

        def joined(columns: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(
                [column[indices] for column, indices in zip(columns, written, strict=True)]
            )

        given = joined([np.arange(len(row.completion)) < row.num_given for row in rows])
        return cls(
            token_ids=put(
                np.concatenate([part for row in rows for part in (row.context, row.completion)])
            ),
            position_ids=put(np.concatenate([np.arange(length) for length in lengths])),
            cu_seqlens=put(starts, torch.int32),
            lengths=lengths,
            loss_index=put(
                np.concatenate(
                    [
                        start + len(row.context) + indices - 1
                        for start, row, indices in zip(starts[:-1], rows, written, strict=True)
                    ]
                )
            ),
            labels=put(joined([row.completion for row in rows])),
            sequence_ids=put(np.repeat(np.arange(len(rows)), counts)),
            temperature=put(repeated([row.temperature for row in rows]), torch.float32),
            rollout_logprobs=put(joined([row.rollout_logprobs for row in rows]), torch.float32),
            advantages=put(joined([row.advantages for row in rows]), torch.float32),
            sequence_loss_tokens=put(counts),
            policy_age=put(
                joined(
                    [
                        np.zeros(len(row.completion)) if row.policy_age is None else row.policy_age
                        for row in rows
                    ]
                ),
                torch.float32,
            ),
            is_guided=put(given | repeated([row.is_guided for row in rows]), torch.bool),
            is_given=put(given, torch.bool),
            is_hinted=put(repeated([row.is_guided or row.is_hinted for row in rows]), torch.bool),
            is_truncated=put(repeated([row.is_truncated for row in rows]), torch.bool),
            num_tokens=num_tokens,
            num_sequences=int((counts > 0).sum()),
        )
