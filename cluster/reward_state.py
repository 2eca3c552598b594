"""Which rubric versions a run has known and which one is live: `rewards.json` of the run directory.

Invariant: the file is replaced whole and durable before a change goes live, so a resumed run goes
on with the rubric that was last promoted. Written by `actors.reward_admin` only; read by
`hone rewards list`.
"""

import os
import time
from pathlib import Path
from typing import Any

import msgspec

FILE = "rewards.json"
RUBRIC = "rubric"  # the key of a group's `reward_versions` that holds the rubric's label
MAX_REMEMBERED = 200


class RubricVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version: `label` is an ordinal and the content hash, for example "3-1a2b3c4d"."""

    ordinal: int
    hash: str
    verifiers: dict[str, dict[str, Any]]
    signals: dict[str, str]  # signal -> reward_version
    created_at: float

    @property
    def label(self) -> str:
        return f"{self.ordinal}-{self.hash}"

    @property
    def full_reward(self) -> float:
        """What a flawless completion earns: 1 from each rewarded signal, 0 from each penalty."""
        return sum(max(0.0, float(v.get("weight", 1.0))) for v in self.verifiers.values())


class RewardState(msgspec.Struct, frozen=True, kw_only=True):
    """All versions, oldest first. `origin` is the rubric of the config that the run began with."""

    origin: dict[str, dict[str, Any]]
    versions: list[RubricVersion] = []
    active: str = ""
    previous: str = ""

    def get(self, label: str) -> RubricVersion | None:
        return next((v for v in self.versions if v.label == label), None)

    def register(
        self, content_hash: str, verifiers: dict[str, dict[str, Any]], signals: dict[str, str]
    ) -> tuple["RewardState", RubricVersion]:
        """The version with this content; the same content keeps the ordinal that it has."""
        for version in self.versions:
            if version.hash == content_hash:
                return self, version
        new = RubricVersion(
            ordinal=1 + max((v.ordinal for v in self.versions), default=0),
            hash=content_hash,
            verifiers=verifiers,
            signals=signals,
            created_at=time.time(),
        )
        kept = [
            version
            for i, version in enumerate(self.versions, start=1)
            if len(self.versions) - i < MAX_REMEMBERED - 1
            or version.label in (self.active, self.previous)
        ]
        return msgspec.structs.replace(self, versions=[*kept, new]), new

    def activate(self, label: str) -> "RewardState":
        previous = self.active if self.active != label else self.previous
        return msgspec.structs.replace(self, active=label, previous=previous)


def load(run_path: Path) -> RewardState | None:
    """The state of a run, or None before its first start."""
    try:
        return msgspec.json.decode((run_path / FILE).read_bytes(), type=RewardState)
    except FileNotFoundError:
        return None


def save(run_path: Path, state: RewardState) -> None:
    """Replace the file; on return it is on disk."""
    temporary = run_path / f"{FILE}.tmp"
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state), indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run_path / FILE)
