"""Folders outside of a run's directory, in memory and among temporary files, and who removes them.

Invariant: such a folder goes with its owner; those of owners that were killed go when the next one
takes a folder beside them. A lock in it, which the kernel gives back by itself, tells which are
which. Taken by launchers, for weights and for Ray's files.
"""

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import ConfigError

PREFIX = "hone-"
_LOCK = ".owner"


@contextmanager
def owned(folder: Path) -> Generator[None]:
    """Make `folder`, whose name begins with `PREFIX`, for this user alone, keep it for the block,
    and remove it. Raises `ConfigError` where something of another user lies.
    """
    _remove_orphans(folder.parent)
    lock = _take(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _take(folder: Path) -> int:
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise ConfigError(f"{folder}: another user has put something there: remove it")
        with suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _LOCK).exists():
                return lock
            os.close(lock)  # taken for an orphan between the two calls


def _remove_orphans(parent: Path) -> None:
    for file in parent.glob(f"{PREFIX}*/{_LOCK}"):
        with suppress(OSError):  # of another user, or gone
            lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(lock)
