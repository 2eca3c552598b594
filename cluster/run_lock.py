"""One launcher per run: whoever holds the lock of a run directory may change what lies in it.

Invariant: taken before anything of the run is touched, and given back by the kernel when its holder
ends, even by kill -9. Where the file system has no locks, the epochs of `cluster.replay_buffer` and
`cluster.checkpoint_store` are what remains. Taken by `hone train` and by the entry of a Ray job.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager

from cluster.errors import ConfigError
from cluster.run_dir import RunDir

_NAME = "lock"
_log = logging.getLogger(__name__)


@contextmanager
def sole_launcher(run: RunDir) -> Generator[None]:
    """Hold the lock of `run` for the block; `ConfigError`, naming its holder, when another has it.

    Makes the run directory if there is none.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.path / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip()
            raise ConfigError(
                f"run {run.name!r} is being trained already, by {holder or 'another process'}: end "
                "that first, or name a new one with `--run NEW`"
            ) from None
        except OSError as error:
            _log.warning("%s: nothing keeps a second launcher away: %s", run.path, error)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
