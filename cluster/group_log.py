"""The book of groups: what became of every group that was sampled, one JSON line per fact.

Invariant: a group that left rollout is here with its verdicts, and each drop is here with its
reason; so a group that is neither used by a step of the ledger, nor waiting in the buffer, nor
dropped here, was lost. Lines that a full disk refuses wait in memory, in their order. Written by
the controller to `groups.jsonl`, read by `hone replay` and `cluster.reconcile`.
"""

import errno
import logging
import threading
import time
from collections import deque
from enum import StrEnum
from pathlib import Path

import msgspec

from cluster.errors import StageError, boundary
from cluster.run_dir import JsonLines, RunDir

MAX_WAITING = 100_000  # lines
_STAGE = "group log"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


class Fate(StrEnum):
    SAMPLED = "sampled"  # scored and put into the buffer
    HELD = "held"  # since before a restart: the buffer has it, or a step has used it
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


class _GroupFate(msgspec.Struct, frozen=True):
    """What a line says of its group, without the rest."""

    group_id: str
    fate: Fate


class GroupLog:
    """`groups.jsonl` of a run, from any thread."""

    def __init__(self, run: RunDir) -> None:
        self._lines = JsonLines(Path(run.path) / "groups.jsonl")
        self._waiting: deque[GroupLine] = deque()
        self._lock = threading.Lock()
        self._is_full = False

    def append(self, line: GroupLine) -> None:
        """Write `line`, after those that wait. Raises `StageError` when more than `MAX_WAITING` do,
        or the file cannot be written for another reason than a full disk.
        """
        with self._lock, boundary(_STAGE):
            self._waiting.append(msgspec.structs.replace(line, time=time.time()))
            self._write()
            if len(self._waiting) > MAX_WAITING:
                raise StageError(
                    _STAGE,
                    f"the disk of {self._lines.path} has been full for {MAX_WAITING} lines, which "
                    "wait in memory: free it and go on with --resume",
                )

    def close(self) -> None:
        """Write what waits; what the disk still refuses is lost with a warning, never an error: it
        would hide the one that has ended the run.
        """
        with self._lock:
            try:
                self._write()
            except OSError as error:
                _log.warning("%s: %s", self._lines.path, error)
            if self._waiting:
                _log.warning("%s lacks its last %d lines", self._lines.path, len(self._waiting))

    def _write(self) -> None:
        try:
            while self._waiting:
                self._lines.append(self._waiting[0])
                self._waiting.popleft()
            self._is_full = False
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._is_full:
                _log.warning("%s: its lines wait in memory: %s", self._lines.path, error)
            self._is_full = True

    def dropped(self, group_id: str, reason: str, detail: str = "") -> None:
        self.append(
            GroupLine(group_id=group_id, fate=Fate.DROPPED, reason=reason, detail=detail[:500])
        )

    def undecided(self) -> set[str]:
        """Groups of which nothing says that they were dropped; some of them may have been used."""
        undecided: set[str] = set()
        for line in self._lines.each(_GroupFate):
            if line.fate is Fate.DROPPED:
                undecided.discard(line.group_id)
            else:
                undecided.add(line.group_id)
        return undecided

    def read(self) -> list[GroupLine]:
        """All facts, oldest first; a line torn by a crash is left out."""
        return self._lines.read(GroupLine)
