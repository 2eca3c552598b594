"""The reference policy: a frozen copy of the policy that RL started from.

Invariant: sharded like the policy, never updated by an optimizer; equal to the policy until the
first step, also after a warm start. Exists only when an objective needs it; goes into checkpoints.
"""

from dataclasses import replace
from typing import cast

import torch
from torch.distributed.fsdp import FSDPModule

from learners.batch import MicroBatch
from learners.model import PolicyModel


class Reference:
    """`module` is a second policy on the same mesh."""

    def __init__(self, module: PolicyModel) -> None:
        self.module = module.requires_grad_(False)

    @torch.no_grad()
    def copy_from(self, policy: PolicyModel) -> None:
        """Take over the weights that `policy` has now, shard by shard."""
        for ours, theirs in zip(self.module.parameters(), policy.parameters(), strict=True):
            ours.copy_(theirs)

    @torch.no_grad()
    def annotate(self, rows: MicroBatch) -> MicroBatch:
        """`rows` with `ref_logprobs`; one forward pass, collective."""
        logprobs = self.module(rows).logprobs
        cast(FSDPModule, self.module).reshard()
        return replace(rows, ref_logprobs=logprobs)
