"""docs/deploy.md, followed: what needs no cluster is run as typed, the rest must exist as typed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster.config import Config
from serve.cli import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def commands(text: str) -> Iterator[str]:
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from block.strip().splitlines()


def test_the_steps_without_a_cluster_work_as_typed(tmp_path: Path) -> None:
    script = "\n".join(commands(SECTIONS["Secrets and checks (no cluster needed)"]))
    for name in ("deploy", "cluster", "actors", "learners", "rewards", "serve"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready: hone train deploy/configs/quickstart.yaml run.steps=3" in done.stdout
    secrets = tmp_path / "secrets"
    assert secrets.stat().st_mode & 0o077 == 0
    assert (secrets / "ray_token").stat().st_mode & 0o077 == 0
    assert len((secrets / "redis_password").read_text().strip()) == 48
    assert "secrets/" in (ROOT / ".gitignore").read_text().split()


HONE_COMMANDS = [
    match
    for line in commands(PAGE)
    for match in re.findall(r"\bhone (?:submit|train|check|doctor)[^'|;]*", line)
]


@pytest.mark.parametrize("line", HONE_COMMANDS)
def test_every_hone_command_takes_these_arguments(line: str) -> None:
    program: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line)
    command = program.commands[name]
    words = arguments[: arguments.index("||")] if "||" in arguments else arguments
    context = command.make_context(name, words, resilient_parsing=False)
    config = context.params.get("config")
    assert config is None or (ROOT / config).is_file()


def test_every_file_and_key_that_the_page_names_is_there() -> None:
    for path in re.findall(r"\b(?:deploy|benchmarks|tests)/[\w./-]+\w", PAGE):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^\| `(\w+\.yaml)` \|", PAGE, re.MULTILINE):
        assert (ROOT / "deploy" / "kuberay" / name).is_file(), name
    for key in re.findall(r"`((?:resources|rollout|run|learner|buffer)\.\w+)", PAGE):
        section, field = key.split(".")
        model = Config.model_fields[section].annotation
        assert field in model.model_fields, key  # pyright: ignore


def test_the_namespaces_that_policies_let_in_are_named() -> None:
    """Whoever has another one would wait for an operator that cannot reach the head."""
    base = (ROOT / "deploy" / "kuberay" / "base.yaml").read_text()
    others = set(re.findall(r"kubernetes\.io/metadata\.name: ([\w-]+)", base)) - {"kube-system"}
    assert others
    for name in others:
        assert f"`{name}`" in SECTIONS["Kubernetes"], name


def test_every_proof_that_the_security_page_names_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    proofs = re.findall(r"`(tests/[\w/.]+)`", page)
    assert len(proofs) >= 6
    for path in proofs:
        assert (ROOT / path).is_file(), path
