"""The book of groups: what became of every group that was sampled, one JSON line per fact.

Invariant: a group that left rollout is here with its verdicts, and each drop is here with its
reason; so a group that is neither used by a step of the ledger, nor waiting in the buffer, nor
dropped here, was lost. Written by the controller to `groups.jsonl`, read by `hone replay` and
`cluster.reconcile`.
"""

import time
from enum import StrEnum
from pathlib import Path

import msgspec

from cluster.run_dir import JsonLines, RunDir


class Fate(StrEnum):
    SAMPLED = "sampled"  # scored and put into the buffer
    HELD = "held"  # the buffer has held it since before a restart
    DROPPED = "dropped"  # will not be trained on; `reason` says why


class GroupLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fact. Lists have one entry per trajectory; a sampled group is dropped in a later line."""

    group_id: str
    fate: Fate
    time: float = 0.0
    reason: str = ""
    detail: str = ""
    task_id: str = ""
    policy_version: int = -1  # the lowest that sampled it
    rewards: list[float | None] = []
    signals: dict[str, list[float | None]] = {}
    reward_versions: dict[str, str] = {}
    arms: list[str] = []
    completion_tokens: list[int] = []


class GroupLog:
    """`groups.jsonl` of a run."""

    def __init__(self, run: RunDir) -> None:
        self._lines = JsonLines(Path(run.path) / "groups.jsonl")

    def append(self, line: GroupLine) -> None:
        self._lines.append(msgspec.structs.replace(line, time=time.time()))

    def dropped(self, group_id: str, reason: str, detail: str = "") -> None:
        self.append(
            GroupLine(group_id=group_id, fate=Fate.DROPPED, reason=reason, detail=detail[:500])
        )

    def read(self) -> list[GroupLine]:
        """All facts, oldest first; a line torn by a crash is left out."""
        return self._lines.read(GroupLine)
