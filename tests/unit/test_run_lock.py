"""One launcher per run: the second is refused before it touches anything, the next one is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from cluster.run_lock import sole_launcher

HOLD = """
import sys
from cluster.run_dir import RunDir
from cluster.run_lock import sole_launcher
with sole_launcher(RunDir(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_launcher_is_refused_and_told_who_has_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo")
    holder = f"'demo' .* by process {os.getpid()} on "
    with sole_launcher(run), pytest.raises(ConfigError, match=holder), sole_launcher(run):
        raise AssertionError("two launchers of one run")
    with sole_launcher(run):
        pass


def test_a_killed_launcher_leaves_the_run_to_the_next(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "), sole_launcher(run):
            raise AssertionError("two launchers of one run")
    finally:
        holder.kill()
        holder.communicate()
    with sole_launcher(run):
        pass
