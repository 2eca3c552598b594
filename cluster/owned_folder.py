"""Folders outside of a run's directory, in memory and among temporary files, and who removes them.

Invariant: such a folder goes with its owner; those of owners that were killed go when the next one
takes a folder beside them. A lock in it, which the kernel gives back by itself, tells which are
which. Taken by launchers, for weights and for Ray's files.
"""

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import ConfigError

PREFIX = "hone-"
MEMORY = Path("/dev/shm")
IN_USE_S, _PAUSE_S = 5.0, 0.05
_log = logging.getLogger(__name__)


@contextmanager
def owned(folder: Path) -> Generator[None]:
    """Make `folder`, whose name begins with `PREFIX`, for this user alone, keep it for the block,
    and remove it. Raises `ConfigError` where something of another user lies, or the folder is in
    use; where the file system has no locks it is kept all the same.
    """
    _remove_orphans(folder.parent)
    lock = _take(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock_name(parent: Path) -> str:
    """On a disk that hosts share the locks of another may not be seen; containers that share
    memory have names of their own and see each other's.
    """
    return ".owner" if parent == MEMORY else f".owner-{socket.gethostname()}"


def _take(folder: Path) -> int:
    deadline = time.monotonic() + IN_USE_S
    name = folder / _lock_name(folder.parent)
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # taken for an orphan between two of these calls
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                raise ConfigError(f"{folder}: another user has put something there: remove it")
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if _keeps(lock) and _is_at(name, lock):
                return lock
            os.close(lock)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{folder}: another launcher uses it; a run of the same path, in a container that "
                "shares this memory, must have another run.dir or run.name"
            )
        time.sleep(_PAUSE_S)


def _keeps(descriptor: int) -> bool:
    """Whether the folder is ours now; where there are no locks nobody can tell, and it is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("no locks there: %s", error)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


def _remove_orphans(parent: Path) -> None:
    for file in parent.glob(f"{PREFIX}*/{_lock_name(parent)}"):
        with suppress(OSError):  # of another user, or gone
            lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, lock):
                    shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(lock)
