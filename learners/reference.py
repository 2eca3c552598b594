"""The reference policy: the policy that RL started from, as a frozen copy or without its adapters.

Invariant: never updated by an optimizer; equal to the policy until the first step, also after a
warm start. Exists only when an objective or the credit needs it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import torch
from torch.distributed.fsdp import FSDPModule

from cluster.config import Config
from learners.batch import MicroBatch
from learners.lora import without_adapters
from learners.model import PolicyModel


class Reference:
    """`module` is a second policy on the same mesh; it goes into checkpoints."""

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


class AdaptersOff:
    """The policy itself without what its adapters add: a reference that costs no memory."""

    def __init__(self, policy: PolicyModel) -> None:
        self._policy = policy

    @torch.no_grad()
    def annotate(self, rows: MicroBatch) -> MicroBatch:
        """As `Reference.annotate`."""
        with without_adapters(self._policy):
            logprobs = self._policy(rows).logprobs
        cast(FSDPModule, self._policy).reshard()
        return replace(rows, ref_logprobs=logprobs)


def open_reference(
    config: Config,
    policy: PolicyModel,
    open_policy: Callable[[str], PolicyModel],
    users: Iterable[object],
) -> Reference | AdaptersOff | None:
    """Where one of `users` has `needs_reference`: a copy, unless nothing but the adapters of RL has
    ever learned, as a warm start would move them, too.
    """
    if not any(getattr(user, "needs_reference", False) for user in users):
        return None
    if config.learner.lora is not None and config.warm_start is None:
        return AdaptersOff(policy)
    return Reference(open_policy("reference"))
