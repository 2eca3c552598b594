"""API keys of the endpoint: made once, shown once, kept as hashes.

Invariant: the file holds SHA-256 digests only, is readable by its owner alone, and every look-up
compares all digests in constant time. A key is 32 random bytes, so a fast hash is enough. Written
by `hone keys`; a running endpoint sees a change at its next request.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import msgspec

from cluster.errors import ConfigError

Scope = Literal["query", "view", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "hone-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key without its secret. Times are unix seconds; `requests_per_minute` replaces the
    endpoint's own limit (0 lifts it).
    """

    name: str
    digest: str
    scopes: list[Scope]
    created_at: float
    expires_at: float | None = None
    requests_per_minute: int | None = None


class KeyStore:
    """Example: `secret = KeyStore(path).create("alice", ["query"])`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: list[ApiKey] = []

    def create(
        self,
        name: str,
        scopes: list[Scope],
        days: float | None = None,
        requests_per_minute: int | None = None,
    ) -> str:
        """A new key; its secret is returned here and nowhere else.

        Raises `ConfigError` for a bad or used name, an unknown scope, or no scope.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"key name must be letters, digits, '.', '_' or '-', got {name!r}")
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise ConfigError(f"--scope must be one of {', '.join(SCOPES)}, got {unknown}")
        secret = PREFIX + secrets.token_urlsafe(32)
        now = time.time()
        with self._changing() as keys:
            if any(key.name == name for key in keys):
                raise ConfigError(f"key {name!r} exists: revoke it first, or choose another name")
            expires_at = None if days is None else now + days * 86400
            keys.append(
                ApiKey(
                    name=name,
                    digest=_digest(secret),
                    scopes=scopes,
                    created_at=now,
                    expires_at=expires_at,
                    requests_per_minute=requests_per_minute,
                )
            )
        return secret

    def revoke(self, name: str) -> None:
        """Remove a key; raises `ConfigError` when there is none of that name."""
        with self._changing() as keys:
            left = [key for key in keys if key.name != name]
            if len(left) == len(keys):
                raise ConfigError(f"no key {name!r} in {self.path}")
            keys[:] = left

    def all(self) -> list[ApiKey]:
        """All keys; the file is read again only when it changed."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return []
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._keys = msgspec.json.decode(self.path.read_bytes(), type=list[ApiKey])
            self._stamp = stamp
        return self._keys

    def find(self, secret: str) -> ApiKey | None:
        """The valid key of this secret; takes as long for a near miss as for any other."""
        digest = _digest(secret)
        now = time.time()
        found: ApiKey | None = None
        for key in self.all():
            is_same = hmac.compare_digest(key.digest, digest)
            is_valid = key.expires_at is None or now < key.expires_at
            found = key if is_same and is_valid else found
        return found

    @contextmanager
    def _changing(self) -> Generator[list[ApiKey]]:
        """The keys under an exclusive lock, written back when the block ends well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = [*self.all()]
            yield keys
            temporary = self.path.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(keys), indent=1))
            temporary.replace(self.path)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
