"""How token losses become one number, by name.

Invariant: `sum` is not normalised; the global count named by `denominator` divides it once, over
all micro-batches and ranks of the update. The default constant of nothing is a padded width.
"""

# ruff: noqa: F722 (shapes in annotations)

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from learners.batch import MicroBatch

Denominator = Literal["tokens", "sequences"]
Name = Literal["token_mean", "seq_mean_token_mean", "constant"]


@dataclass(frozen=True)
class Aggregation:
    """token_mean divides by all loss tokens (DAPO, arXiv 2503.14476); seq_mean_token_mean averages
    each sequence first (GRPO, arXiv 2402.03300); constant divides each sequence's sum by
    `constant` (Dr. GRPO, arXiv 2503.20783).

    Losses 1 on 2 tokens and 2 on 4 tokens: 10/6, 1.5, and .625 with constant 8.
    """

    name: Name = "token_mean"
    constant: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ValueError(
                f"aggregation must be one of {', '.join(get_args(Name))}, got {self.name!r}"
            )
        is_constant = self.name == "constant"
        if is_constant != (self.constant is not None) or (self.constant or 1) <= 0:
            raise ValueError(
                "constant must be a positive number of tokens with aggregation=constant, and unset "
                f"otherwise; got constant={self.constant}, aggregation={self.name}"
            )

    @property
    def denominator(self) -> Denominator:
        return "tokens" if self.name == "token_mean" else "sequences"

    def sum(self, losses: Float[Tensor, " N"], rows: MicroBatch) -> Float[Tensor, ""]:
        """Differentiable sum that the global count of `denominator` divides."""
        if self.name == "seq_mean_token_mean":
            losses = losses / rows.sequence_loss_tokens[rows.sequence_ids]
        elif self.constant is not None:
            losses = losses / self.constant
        return losses.sum()
