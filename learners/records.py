"""What a driver and the ranks of a learner hand each other; no torch here (`learners.rank`)."""

from collections.abc import Sequence
from dataclasses import dataclass

Example = tuple[Sequence[int], Sequence[int]]  # (context tokens, completion tokens)


@dataclass(frozen=True)
class ScoreRequest:
    """`token_ids` [C + L], of which the first `num_context` = C >= 1 are given."""

    token_ids: Sequence[int]
    num_context: int


@dataclass(frozen=True)
class WarmStartProgress:
    step: int  # steps done
    steps: int
    loss: float  # nats per completion token
