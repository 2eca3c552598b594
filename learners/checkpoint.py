"""Learner state on disk: sharded checkpoints to go on from, Hugging Face directories to use.

Invariant: what is saved is enough to repeat the next step exactly: weights, AdamW moments, step
counters and each rank's RNG. The world size may change between save and load. All functions are
collective. Atomicity (the COMPLETE marker) belongs to `cluster.checkpoint_store`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cluster.errors import ConfigError
from learners.weight_source import write_safetensors

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class Progress:
    """`step` counts calls of `optim_step`, `policy_version` those that changed the weights."""

    step: int
    policy_version: int


def save(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write this rank's shards of everything into `directory`."""
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state_dict_saver.save(
        {
            "model": model_state,
            "optimizer": optimizer_state,
            "progress": _as_tensor(progress),
            f"rng_{dist.get_rank()}": torch.get_rng_state(),
        },
        checkpoint_id=directory,
    )


def load(directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Read `directory` into the module and the optimizer; a new rank keeps its fresh RNG."""
    if not (directory / ".metadata").is_file():
        raise ConfigError(f"{directory} must be a learner checkpoint (it has no .metadata)")
    model_state, optimizer_state = get_state_dict(module, optimizer)
    progress = _as_tensor(Progress(0, 0))
    state = {"model": model_state, "optimizer": optimizer_state, "progress": progress}
    rng_key, rng = f"rng_{dist.get_rank()}", torch.get_rng_state()
    if rng_key in FileSystemReader(directory).read_metadata().state_dict_metadata:
        state[rng_key] = rng
    state_dict_loader.load(state, checkpoint_id=directory)
    set_state_dict(
        module, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )
    torch.set_rng_state(rng)
    step, policy_version = progress.tolist()
    return Progress(step, policy_version)


def export_hf(directory: Path, module: nn.Module, policy_dir: Path, dtype: torch.dtype) -> None:
    """A directory for `from_pretrained` and vLLM: current weights, the policy's other files."""
    is_writer = dist.get_rank() == 0
    if is_writer:
        directory.mkdir(parents=True, exist_ok=True)
        for file in policy_dir.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copy(file, directory / file.name)
    write_safetensors(module, directory / "model.safetensors", dtype, is_writer)


def _as_tensor(progress: Progress) -> torch.Tensor:
    return torch.tensor([progress.step, progress.policy_version])
