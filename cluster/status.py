"""The one-screen state of a run, as a file: `runs/<name>/status.json`, replaced atomically.

Invariant: a reader sees a whole status or none. Written by the controller (and by the launcher
before the controller exists), read by the live view and by `hone status`, which need nothing but
the run directory.
"""

import os
from pathlib import Path

import msgspec

FILE_NAME = "status.json"


class StageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of the loop. `waiting_for` is empty while it works; `since_s` is the age of that
    state.
    """

    name: str  # dispatch, rollout, score, learn, sync, eval
    waiting_for: str = ""
    since_s: float = 0.0
    busy_fraction: float = 0.0


class ActorStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One Ray actor. `policy_version` is -1 where it does not apply."""

    name: str  # rollout/0, reward/0, learner/0
    state: str  # starting, stale, healthy, asleep, quarantined, leaving, dead
    policy_version: int = -1
    pid: int = 0


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a person wants to see of a live run."""

    run: str
    phase: str  # starting, warm_start, training, evaluating, recovering, stopping, finished, failed
    phase_detail: str = ""  # "loading engine 1/1"
    phase_expected_s: float = 0.0  # how long this phase takes on a similar machine; 0 = unknown
    phase_started_at: float = 0.0  # unix seconds
    started_at: float = 0.0
    updated_at: float = 0.0
    step: int = 0
    steps: int = 0
    policy_version: int = 0
    tokens_per_s: float = 0.0
    policy_age: float = 0.0
    buffer_depth: int = 0
    groups_dropped: int = 0
    reward_history: list[float] = []
    entropy_history: list[float] = []
    eval_history: list[tuple[int, float]] = []  # (step, pass@1)
    stages: list[StageStatus] = []
    actors: list[ActorStatus] = []
    last_events: list[str] = []
    error: str = ""


def write(run_dir: Path, status: RunStatus) -> None:
    """Replace the status file; a reader never sees half of it."""
    target = run_dir / FILE_NAME
    temporary = run_dir / f".{FILE_NAME}.{os.getpid()}"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(status), indent=1))
    temporary.replace(target)


def read(run_dir: Path) -> RunStatus | None:
    """The current status, or None where the run has not written one yet."""
    try:
        return msgspec.json.decode((run_dir / FILE_NAME).read_bytes(), type=RunStatus)
    except FileNotFoundError:
        return None
