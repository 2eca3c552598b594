"""The token that every request to a Ray cluster carries; it is as good as a shell on each node.

Invariant: after `ensure`, Ray authenticates by token in this process and its children, and a token
file that this machine keeps is readable by its owner only. The token itself is never on a command
line. Called before Ray is started or joined.
"""

import errno
import os
import secrets
import stat
import sys
from pathlib import Path

from cluster.errors import ConfigError

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"


def ensure(*, may_create: bool) -> None:
    """Turn token authentication on. A local cluster `may_create` its token; a joined one has one.

    Raises `ConfigError` when authentication is switched off, or no token can be found.
    """
    if os.environ.get(MODE, "token").lower() != "token":
        raise ConfigError(
            f"{MODE}={os.environ[MODE]}: must be `token`, or anyone who reaches a port of the "
            "cluster runs code on it; unset it"
        )
    os.environ[MODE] = "token"
    if raylet := sys.modules.get("ray._raylet"):
        raylet.Config.initialize("")  # Ray, imported before, has noted that the mode was unset
    if os.environ.get(TOKEN):
        return
    path = token_file()
    if not path.exists():
        if not may_create:
            raise ConfigError(
                f"{path}: the cluster's token is needed: copy it there (mode 0600), "
                f"or set {TOKEN_PATH}"
            )
        _create(path)
    _keep_private(path)


def token_file() -> Path:
    """Where Ray looks for the token when the environment does not hold it."""
    return Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(temporary, path)  # of two processes that create it, one wins and both use it
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _keep_private(path: Path) -> None:
    """A mounted secret of another owner is left as it is; a file of ours is closed to others."""
    facts = path.stat()
    if facts.st_size == 0:
        raise ConfigError(f"{path}: the token file must not be empty")
    if facts.st_uid == os.getuid() and stat.S_IMODE(facts.st_mode) & 0o077:
        try:
            path.chmod(0o600)
        except OSError as error:
            if error.errno == errno.EROFS:
                return  # a secret that was mounted: whoever mounted it chose its mode
            raise ConfigError(f"{path}: must be readable by its owner only: {error}") from error
