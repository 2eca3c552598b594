"""What a checkpoint must hold besides tensors, so that a run goes on as if it had never stopped.

Invariant: plain data that a later version of Hone reads; new fields have defaults. Made by
`actors.bookkeeping`, kept by `cluster.checkpoint_store`.
"""

import msgspec

from cluster.types import Passes


class PrefixState(msgspec.Struct, frozen=True, kw_only=True):
    """How long the beginnings of prefixed rollouts are, the accuracies of the steps since they
    became so, and the settled groups: verdicts since the last step, lengths since the first.
    """

    tokens: int
    accuracies: list[float] = []
    passes: Passes = Passes()


class CurriculumState(msgspec.Struct, frozen=True, kw_only=True):
    """How far the task order got: draws made, and those whose groups were not settled yet.

    `early` are groups that a restart brought back and that were settled before their draw.
    """

    num_drawn: int = 0
    pending: list[int] = []
    early: list[str] = []
    prefix: PrefixState | None = None


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. `config_hash` tells whether a resumed run is the same run."""

    run_id: str
    step: int
    policy_version: int
    config_hash: str
    curriculum: CurriculumState = CurriculumState()
    reward_versions: dict[str, str] = {}
