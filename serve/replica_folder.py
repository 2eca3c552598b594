"""The folder of one replica's weight files, and the end of those whose replica has gone.

Invariant: a folder is removed by its own replica, or by anyone once no process holds its lock; the
kernel gives that back even after kill -9, and in whichever container it was. A folder that another
host may hold, on a disk they share, is left to that host: locks need not reach from one to the
other. The folders of one run's endpoints lie side by side, so that none has to be made or removed
together with another's.
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
_MEMORY = Path("/dev/shm")


class ReplicaFolder:
    """Example: `folder = ReplicaFolder(run)`, files in `folder.path`, then `folder.close()`."""

    def __init__(self, run: RunDir) -> None:
        name = f"{_prefix(run)}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.path = run.weights.with_name(name)
        self.path.mkdir()
        coming = self.path / f"{_LOCK}.new"  # seen by nobody until it is locked
        self._descriptor = os.open(coming, os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(OSError):  # a file system without locks: only `close` removes the folder
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        coming.rename(self.path / _LOCK)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def sweep(run: RunDir) -> None:
    """Remove what replicas of `run` left that have gone; on a disk, those of this host."""
    prefix, parent = _prefix(run), run.weights.parent
    for lock in parent.glob(f"{prefix}*/{_LOCK}"):
        host = lock.parent.name.removeprefix(prefix).rsplit("-", 2)[0]
        if host != socket.gethostname() and not parent.is_relative_to(_MEMORY):
            continue
        with suppress(OSError):  # its replica lives, or someone else removes it
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def _prefix(run: RunDir) -> str:
    return f"{run.weights.name}-endpoint-"
