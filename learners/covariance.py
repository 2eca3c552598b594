"""How much each token's probability moves with its advantage: the driver of entropy collapse.

Invariant: means are taken over all loss tokens of the update and carry no gradient. Used by
Clip-Cov and KL-Cov (arXiv 2505.22617).
"""

# ruff: noqa: F722 (shapes in annotations)

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from learners.batch import MicroBatch
from learners.logprobs import TokenOutputs


@dataclass(frozen=True)
class Covariance:
    """cov_t = (A_t - mean A) (l_t - mean l). A = [2, -1, 0, -1] and l = [-.1, -2, -1, -.5] give
    [1.6, 1.1, 0, -.4].
    """

    mean_advantage: float = 0.0
    mean_logprob: float = 0.0

    @staticmethod
    def survey(rows: MicroBatch, outputs: TokenOutputs) -> Float[Tensor, "N 2"]:
        return torch.stack([rows.advantages.double(), outputs.logprobs.detach().double()], -1)

    @classmethod
    def of(cls, table: Float[Tensor, "N C"]) -> "Covariance":
        """From the first two columns of the whole update's survey."""
        if len(table) == 0:
            return cls()
        advantage, logprob = table[:, :2].mean(0).tolist()
        return cls(advantage, logprob)

    def __call__(self, table: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        return (table[:, 0] - self.mean_advantage) * (table[:, 1] - self.mean_logprob)
