"""The token file: made once, private, and never passed over in silence."""

import stat
from pathlib import Path

import pytest

from cluster import ray_token
from cluster.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (ray_token.MODE, ray_token.TOKEN, ray_token.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_local_cluster_gets_a_private_token_once(home: Path) -> None:
    ray_token.ensure(may_create=True)
    path = home / ".ray" / "auth_token"
    first = path.read_text()
    assert len(first) == 64
    assert mode(path) == 0o600
    ray_token.ensure(may_create=True)
    assert path.read_text() == first
    assert [p.name for p in path.parent.iterdir()] == ["auth_token"]


def test_a_token_that_others_can_read_is_closed(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    ray_token.ensure(may_create=False)
    assert mode(path) == 0o600


def test_joining_without_a_token_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
        ray_token.ensure(may_create=False)


def test_authentication_cannot_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ray_token.MODE, "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled"):
        ray_token.ensure(may_create=True)


def test_an_empty_token_file_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = home / "token"
    empty.touch()
    monkeypatch.setenv(ray_token.TOKEN_PATH, str(empty))
    with pytest.raises(ConfigError, match="must not be empty"):
        ray_token.ensure(may_create=False)


def test_a_loopback_address_stays_one_only_where_asked() -> None:
    """Ray would put the host's own address in its place."""
    from ray._private.services import resolve_ip_for_localhost

    from actors.connection import on_loopback

    with on_loopback():
        assert resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
    assert resolve_ip_for_localhost("127.0.0.2") == "127.0.0.2"
