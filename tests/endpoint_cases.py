"""A run directory with real weights and no trainer, for tests of the policy endpoint."""

import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster import config_file, published
from cluster.config import Config
from cluster.run_dir import RunDir


def make_run(config: Config, policy_dir: Path, parent: Path, name: str = "demo") -> RunDir:
    """A run whose policy is a copy of `policy_dir`; nothing is published yet."""
    run = RunDir.create(parent, name, config_file.dump(config), exist_ok=False)
    run.policy.mkdir()
    for file in policy_dir.iterdir():
        (run.policy / file.name).write_bytes(file.read_bytes())
    run.weights.mkdir(parents=True)
    return run


def publish(run: RunDir, version: int, *, scale: float = 0.02, announce: bool = True) -> Path:
    """Publish the run's first weights plus noise drawn from `version`, as a trainer does."""
    generator = torch.Generator().manual_seed(version)
    tensors = {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(run.policy / "model.safetensors").items()
    }
    return put(run, version, tensors, announce=announce)


def put(run: RunDir, version: int, tensors: dict[str, Any], *, announce: bool = True) -> Path:
    path = run.weights / f"policy_{version:08d}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)
    if announce:
        published.announce(run.weights, version, path)
    for old in sorted(run.weights.glob("policy_*.safetensors"))[:-2]:
        old.unlink()
    return path


class Publisher(threading.Thread):
    """Publishes `count` versions from `first` on, one every `every_s`."""

    def __init__(self, run: RunDir, first: int, count: int, every_s: float) -> None:
        super().__init__(daemon=True)
        self._run = run
        self._versions = range(first, first + count)
        self._every_s = every_s

    def run(self) -> None:
        for version in self._versions:
            publish(self._run, version)
            time.sleep(self._every_s)
