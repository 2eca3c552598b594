"""Folders of replicas that share a run: each keeps its own, and what a killed one left goes."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.run_dir import RunDir
from serve.replica_folder import ReplicaFolder, sweep


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs", "demo", "{}", exist_ok=False)
    run.share_weights()
    return run


def test_what_a_killed_replica_left_goes_and_what_others_hold_stays(run: RunDir) -> None:
    program = (
        "import sys; from cluster.run_dir import RunDir; "
        "from serve.replica_folder import ReplicaFolder\n"
        "folder = ReplicaFolder(RunDir(sys.argv[1])); (folder.path / 'weights').touch()\n"
        "print(folder.path, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        mine = ReplicaFolder(run)
        sweep(run)
        assert (left / "weights").is_file(), "its replica lives"
        os.kill(other.pid, signal.SIGKILL)
    sweep(run)
    assert (left.exists(), mine.path.is_dir()) == (False, True)
    mine.close()
    sweep(run)
    assert not mine.path.exists()


def test_two_replicas_of_one_process_number_have_two_folders(run: RunDir) -> None:
    one, other = ReplicaFolder(run), ReplicaFolder(run)
    one.close()
    assert other.path.is_dir()
    other.close()


def test_on_a_disk_what_another_host_left_stays(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two hosts the name of one begins with that of the other."""
    here = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: f"{here}-2")
    left = ReplicaFolder(run)
    os.close(left._descriptor)  # what its end gives back
    monkeypatch.setattr(socket, "gethostname", lambda: here)
    sweep(run)
    assert left.path.is_dir()
    monkeypatch.setattr(socket, "gethostname", lambda: f"{here}-2")
    sweep(run)
    assert not left.path.exists()


def test_a_folder_comes_while_others_are_swept(run: RunDir) -> None:
    is_over = threading.Event()

    def sweep_on() -> None:
        while not is_over.is_set():
            sweep(run)

    sweeper = threading.Thread(target=sweep_on)
    sweeper.start()
    try:
        for _ in range(200):
            folder = ReplicaFolder(run)
            assert (folder.path / "lock").is_file()
            folder.close()
    finally:
        is_over.set()
        sweeper.join()
