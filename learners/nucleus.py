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
_FIRST, _BINS = 64, 2048
_RANGE = 20.0  # nats below the most probable token that the bins tell apart


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

        Looks at the top 64 tokens first, which is all that a trained policy mostly needs; rows
        whose top 64 hold less than `mass` are counted into bins of log p, and only the bin that
        crosses `mass` is sorted.
        """
        top = p.topk(min(_FIRST, p.shape[1])).values
        result = self._smallest_kept(top, torch.zeros_like(p[:, 0]), torch.inf)
        if p.shape[1] > _FIRST:
            rows = (top.sum(-1) < self.mass).nonzero().squeeze(-1)
            if len(rows):
                result[rows] = self._by_bins(p[rows], top[rows, 0])
        return result

    def _by_bins(self, p: Tensor, largest: Tensor) -> Tensor:
        depth = (largest.log()[:, None] - p.log()) * (_BINS / _RANGE)
        bins = depth.clamp(0, _BINS - 1).long()
        held = p.new_zeros(len(p), _BINS).scatter_add_(-1, bins, p).cumsum(-1)
        crossing = (held < self.mass).sum(-1, keepdim=True).clamp(max=_BINS - 1)
        before = held.gather(-1, (crossing - 1).clamp(min=0)).squeeze(-1)
        before = before.where(crossing[:, 0] > 0, 0.0)
        is_inside = bins == crossing
        inside = (p * is_inside).topk(max(1, int(is_inside.sum(-1).max()))).values  # 1: mass 1
        above = torch.where(bins < crossing, p, torch.inf).amin(-1)
        return self._smallest_kept(inside, before, above)

    def _smallest_kept(self, ordered: Tensor, before: Tensor, above: Tensor | float) -> Tensor:
        """Of `ordered` [N, K], falling, with mass `before` above it; `above` where none is kept."""
        reached = ordered.cumsum(-1) + before[:, None]
        if self.rule == "crossing_in":
            num_kept = (reached[:, :-1] < self.mass).sum(-1) + 1
        else:
            num_kept = (reached < self.mass).sum(-1)
        num_kept = torch.minimum(num_kept, (ordered > 0).sum(-1))
        smallest = ordered.gather(-1, (num_kept - 1).clamp(min=0)[:, None]).squeeze(-1)
        return torch.where(num_kept > 0, smallest, above)
