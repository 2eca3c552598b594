"""The folder of one replica's weight files, and the end of those whose replica has gone.

Invariant: a folder is removed by its own replica, or by anyone once no process holds its lock; the
kernel gives that back even after kill -9, and in whichever container it was. Endpoints of one run
therefore share a parent folder and never take files from each other.
"""

import fcntl
import os
import shutil
import socket
import uuid
from contextlib import suppress
from pathlib import Path

from cluster.run_dir import RunDir

_LOCK = "lock"


class ReplicaFolder:
    """Example: `folder = ReplicaFolder(run)`, files in `folder.path`, then `folder.close()`."""

    def __init__(self, run: RunDir) -> None:
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.path = _parent(run) / name
        self.path.mkdir(parents=True)
        self._descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(OSError):  # a file system without locks: only `close` removes the folder
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def sweep(run: RunDir) -> None:
    """Remove what replicas of `run` left that have gone."""
    parent = _parent(run)
    for lock in parent.glob(f"*/{_LOCK}"):
        with suppress(OSError):  # its replica lives, or someone else removes it
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
    with suppress(OSError):  # there is none, or it is in use
        parent.rmdir()


def _parent(run: RunDir) -> Path:
    return run.weights.with_name(f"{run.weights.name}-endpoint")
