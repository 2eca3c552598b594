"""A run that goes on waits for no library that it needs no more."""

import shutil
import subprocess
import sys
from pathlib import Path

from actors import prepared_policy
from actors.prepared_policy import PreparedPolicy
from cluster.run_dir import RunDir

HEAVY = ("torch", "transformers", "vllm")


def test_launcher_and_controller_import_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, actors.train, actors.controller\n"
        f"print([module for module in {HEAVY!r} if module in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_was_prepared_is_known_while_its_directory_is_there(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "demo", "run: {}\n", exist_ok=False)
    assert prepared_policy.known(run) is None
    policy = PreparedPolicy(tmp_path / "policy", 2, [[1, 5], [7]], [([1], [2])])
    prepared_policy.keep(run, policy)
    assert prepared_policy.known(run) is None
    policy.directory.mkdir()
    (policy.directory / "config.json").touch()
    assert prepared_policy.known(run) == PreparedPolicy(policy.directory, 2, [[1, 5], [7]], [])
    moved = RunDir(shutil.copytree(run.path, tmp_path / "copied"))
    assert prepared_policy.known(moved) is None, "the other one may go"
    run.share_weights()
    assert prepared_policy.known(run) is None, "other nodes do not see it"
    prepared_policy.keep(run, policy)
    assert prepared_policy.known(run) is not None
    run.prepared.write_text('{"directory": "')
    assert prepared_policy.known(run) is None
