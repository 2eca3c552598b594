"""API keys: shown once, kept as hashes, scoped, expiring, revocable under a running reader."""

import stat
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from serve.api_keys import KeyStore


def test_a_key_is_found_by_its_secret_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    secret = store.create("alice", ["query"])
    found = store.find(secret)
    assert found is not None
    assert (found.name, found.scopes) == ("alice", ["query"])
    assert store.find(secret + "x") is None
    assert store.find("") is None
    assert store.find("\ud800") is None
    assert secret.encode() not in store.path.read_bytes()
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert len(secret) >= 43


def test_another_process_sees_a_new_and_a_revoked_key(tmp_path: Path) -> None:
    reader, writer = KeyStore(tmp_path / "keys.json"), KeyStore(tmp_path / "keys.json")
    assert reader.find("x") is None
    secret = writer.create("bob", ["admin"])
    assert reader.find(secret) is not None
    writer.revoke("bob")
    assert reader.find(secret) is None


def test_an_expired_key_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = KeyStore(tmp_path / "keys.json")
    secret = store.create("short", ["query"], days=1)
    assert store.find(secret) is not None
    later = time.time() + 86401
    monkeypatch.setattr(time, "time", lambda: later)
    assert store.find(secret) is None


@pytest.mark.parametrize(
    ("name", "scopes", "message"),
    [
        ("a", ["query"], "exists"),
        ("../x", ["query"], "key name"),
        ("b", [], "--scope"),
        ("b", ["root"], "--scope"),
    ],
)
def test_bad_keys_are_refused(tmp_path: Path, name: str, scopes: list, message: str) -> None:
    store = KeyStore(tmp_path / "keys.json")
    store.create("a", ["query"])
    with pytest.raises(ConfigError, match=message):
        store.create(name, scopes)
    assert [key.name for key in store.all()] == ["a"]


def test_revoking_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key 'x'"):
        KeyStore(tmp_path / "keys.json").revoke("x")
