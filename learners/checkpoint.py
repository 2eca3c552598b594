"""Learner state on disk: sharded checkpoints to go on from, Hugging Face directories to use.

Invariant: what is saved is enough to repeat the next step exactly: weights, AdamW moments, step
counters, what losses remember (SIREN's anchor) and each rank's RNG. The world size may change
between save and load. All functions are collective. Atomicity (the COMPLETE marker) belongs to
`cluster.checkpoint_store`.
"""

import shutil
from collections.abc import Generator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from cluster.errors import ConfigError, StageError
from learners.weight_source import write_safetensors

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class Progress:
    """`step` counts calls of `optim_step`, `policy_version` those that changed the weights."""

    step: int
    policy_version: int


@dataclass(frozen=True)
class Part:
    """A sharded module with what trains it; a frozen one has no optimizer."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None


class Saver:
    """Saves beside training: tensors are copied at once, the files are written by a thread.

    It has a process group of its own, so that its collectives never meet those of a step.
    """

    def __init__(self) -> None:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._pending: Future[Any] | None = None

    def begin(
        self,
        directory: Path,
        parts: Mapping[str, Part],
        objectives: Mapping[str, torch.Tensor],
        progress: Progress,
    ) -> None:
        """Start to write this rank's shards of everything into `directory`.

        `parts` by name ("model" is the policy); `objectives` are the numbers that losses keep
        between steps, the same on every rank.
        """
        state = _whole_state(parts, objectives, progress)
        with _named_failures():
            pending = state_dict_saver.async_save(
                state, checkpoint_id=directory, process_group=self._group
            )
        assert isinstance(pending, Future)
        self._pending = pending

    def is_done(self) -> bool:
        return self._pending is None or self._pending.done()

    def finish(self) -> None:
        """Wait for the files; raises `StageError` when they could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with _named_failures():
                pending.result()


@contextmanager
def _named_failures() -> Generator[None]:
    """DCP's failures, some of which are no `Exception`, as the checkpoint stage's."""
    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise StageError("checkpoint", f"not written: {text[-400:]}") from None


def load(
    directory: Path, parts: Mapping[str, Part], objectives: Mapping[str, torch.Tensor]
) -> Progress:
    """Read `directory` into the parts and, in place, into `objectives`; a new rank keeps its fresh
    RNG.
    """
    if not (directory / ".metadata").is_file():
        raise ConfigError(f"{directory} must be a learner checkpoint (it has no .metadata)")
    progress = _as_tensor(Progress(0, 0))
    state: dict[str, Any] = _state(parts) | {"progress": progress}
    state |= {f"objective_{name}": values for name, values in objectives.items()}
    rng_key, rng = f"rng_{dist.get_rank()}", torch.get_rng_state()
    if rng_key in FileSystemReader(directory).read_metadata().state_dict_metadata:
        state[rng_key] = rng
    state_dict_loader.load(state, checkpoint_id=directory)
    for name, part in parts.items():
        if part.optimizer is None:
            set_model_state_dict(part.module, state[name])
        else:
            set_state_dict(
                part.module,
                part.optimizer,
                model_state_dict=state[name],
                optim_state_dict=state[_optimizer_key(name)],
            )
    torch.set_rng_state(rng)
    step, policy_version = progress.tolist()
    return Progress(step, policy_version)


def _whole_state(
    parts: Mapping[str, Part], objectives: Mapping[str, torch.Tensor], progress: Progress
) -> dict[str, Any]:
    state = _state(parts)
    state |= {f"objective_{name}": values for name, values in objectives.items()}
    state |= {"progress": _as_tensor(progress), f"rng_{dist.get_rank()}": torch.get_rng_state()}
    return state


def _state(parts: Mapping[str, Part]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, part in parts.items():
        if part.optimizer is None:
            state[name] = get_model_state_dict(part.module)
        else:
            _begin(part.optimizer)
            state[name], state[_optimizer_key(name)] = get_state_dict(part.module, part.optimizer)
    return state


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """The state of AdamW before its first step. Torch would make it by a step without gradients and
    count that one: a run that is saved at its start would take smaller steps than another.
    """
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _optimizer_key(name: str) -> str:
    return "optimizer" if name == "model" else f"{name}_optimizer"


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
