"""The announcement of the newest proven policy weights: `current.json` beside the published files.

Invariant: a reader sees a whole announcement or none, and it names a file that was complete and
loaded by the rollout engines when it was written. Written by `actors.weight_sync` after each sync;
polled by the policy endpoint, so an endpoint that was away misses nothing.
"""

import time
from pathlib import Path

import msgspec

FILE_NAME = "current.json"
KEEP_FILES = 2  # versions of the weights that stay


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """One announced version. `time` in unix seconds tells two runs of one version apart."""

    policy_version: int
    path: str
    time: float


def announce(directory: Path, policy_version: int, path: Path) -> None:
    """Replace the announcement in `directory`."""
    record = Published(policy_version=policy_version, path=str(path), time=time.time())
    temporary = directory / f".{FILE_NAME}.tmp"
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.replace(directory / FILE_NAME)


def read(directory: Path) -> Published | None:
    """What is announced in `directory`; None before the first sync and after the end of a run."""
    try:
        return msgspec.json.decode((directory / FILE_NAME).read_bytes(), type=Published)
    except FileNotFoundError:
        return None
