"""The nucleus (top-p set) of a next-token distribution, found without sorting the vocabulary.

Invariant: a nucleus is described by its smallest kept probability alone, so the backward pass
finds the same set from one number per row; all tokens tied at that probability are kept. Called by
`learners.logprobs`.
"""

# ruff: noqa: F722 (shapes in annotations)

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

NucleusRule = Literal["crossing_in", "crossing_out"]
_FIRST, _GROWTH = 64, 16


@dataclass(frozen=True)
class Nucleus:
    """The most probable tokens that hold `mass` together.

    crossing_in keeps the token that crosses `mass` (the textbook rule); crossing_out drops it, as
    the code released with SIREN (arXiv 2509.25133) does. Of [.6, .25, .1, .05] with mass .8 the
    first keeps two tokens, the second one.
    """

    mass: float = 0.8
    rule: NucleusRule = "crossing_in"

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"nucleus mass must be in (0, 1], got {self.mass}")
        if self.rule not in get_args(NucleusRule):
            raise ValueError(
                f"nucleus rule must be one of {', '.join(get_args(NucleusRule))}, got {self.rule!r}"
            )

    def thresholds(self, p: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Smallest kept probability of each row; infinity where nothing is kept.

        Looks at the top 64 tokens, and only for rows whose top 64 hold too little at 16 times as
        many, and so on: a trained policy is done after one look.
        """
        result = torch.full_like(p[:, 0], torch.inf)
        rows, size = torch.arange(len(p), device=p.device), min(_FIRST, p.shape[1])
        while len(rows):
            candidates = p if len(rows) == len(p) else p[rows]
            top = candidates.topk(size).values
            reached = top.cumsum(-1)
            if self.rule == "crossing_in":
                num_kept = (reached[:, :-1] < self.mass).sum(-1) + 1
            else:
                num_kept = (reached < self.mass).sum(-1)
            smallest = top.gather(-1, (num_kept - 1).clamp(min=0)[:, None]).squeeze(-1)
            result[rows] = smallest.where(num_kept > 0, torch.inf)
            if size == p.shape[1]:
                break
            rows = rows[reached[:, -1] < self.mass]
            size = min(size * _GROWTH, p.shape[1])
        return result
