"""What a killed process leaves outside of its run goes with the next one; what lives stays."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.owned_folder import owned

OWNER = """
import sys
from pathlib import Path
from cluster.owned_folder import owned
with owned(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "weights").touch()
    print("here", flush=True)
    sys.stdin.read()
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    return process


def test_a_folder_goes_with_its_owner_or_with_the_next_one(tmp_path: Path) -> None:
    killed, alive = tmp_path / "hone-killed", tmp_path / "hone-alive"
    for name in ("hone-soak", "other-killed"):
        (tmp_path / name).mkdir()
    processes = [start(killed), start(alive)]
    processes[0].kill()
    processes[0].communicate(timeout=10)
    assert (killed / "weights").exists()
    with owned(tmp_path / "hone-next"):
        assert not killed.exists()
        assert (alive / "weights").exists()
        assert (tmp_path / "hone-soak").is_dir(), "nobody's"
        assert (tmp_path / "other-killed").is_dir()
    assert not (tmp_path / "hone-next").exists()
    processes[1].communicate(timeout=10)
    assert not alive.exists()


def test_it_is_for_its_user_alone(tmp_path: Path) -> None:
    with owned(tmp_path / "hone-own"):
        assert (tmp_path / "hone-own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "hone-link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="another user"), owned(tmp_path / "hone-link"):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_a_killed_owner_left_is_taken_by_the_next_of_the_same_name(tmp_path: Path) -> None:
    folder = tmp_path / "hone-weights"
    process = start(folder)
    process.kill()
    process.communicate(timeout=10)
    with owned(folder):
        assert folder.is_dir()
        assert not (folder / "weights").exists()
    assert not folder.exists()


def test_one_that_is_in_use_is_refused_rather_than_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.owned_folder.IN_USE_S", 0.2)
    process = start(tmp_path / "hone-weights")
    with pytest.raises(ConfigError, match="another launcher uses it"):
        owned(tmp_path / "hone-weights").__enter__()
    assert (tmp_path / "hone-weights" / "weights").exists()
    process.communicate(timeout=10)


def test_without_locks_a_folder_is_kept_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with owned(tmp_path / "hone-weights"):
        assert (tmp_path / "hone-weights").is_dir()
        assert "No locks available" in caplog.text
