"""A checkpoint of a run as a Hugging Face directory, without Ray: one process, CPU only.

Invariant: `DEST` is complete or absent, once this has returned or raised. Called by `hone export`.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from cluster import config_file
from cluster.checkpoint_store import CheckpointStore
from cluster.errors import ConfigError, boundary
from cluster.run_dir import RunDir


def write(run_dir: RunDir, dest: Path, version: int | None) -> Path:
    """Write policy `version` (None = the newest checkpoint of the run) to the new directory `dest`.

    Raises `ConfigError` when `dest` exists or the run keeps no such checkpoint.
    """
    if dest.exists():
        raise ConfigError(f"{dest}: must not exist yet")
    checkpoint = _find(run_dir, version)
    building = dest.with_name(f".{dest.name}.{os.getpid()}")
    try:
        with boundary("export"):
            _convert(run_dir, checkpoint, building)
            building.rename(dest)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return dest


def upload(run_dir: RunDir, url: str, version: int | None) -> str:
    """As `write`, to a directory of any file system that fsspec has a package for (`s3://...`)."""
    try:
        files, place = cast(Any, fsspec).url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {error}") from error
    with boundary("export"):
        if files.exists(place):
            raise ConfigError(f"{url}: must not exist yet")
        with tempfile.TemporaryDirectory() as temporary:
            built = write(run_dir, Path(temporary) / "model", version)
            try:
                for file in filter(Path.is_file, built.rglob("*")):
                    target = f"{place}/{file.relative_to(built).as_posix()}"
                    files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    files.put_file(str(file), target)
            except BaseException:
                if files.exists(place):
                    files.rm(place, recursive=True)
                raise
    return url


def _find(run_dir: RunDir, version: int | None) -> Path:
    kept = CheckpointStore(run_dir.checkpoints, keep=1).all()
    if not kept:
        raise ConfigError(f"{run_dir.checkpoints}: this run has no complete checkpoint yet")
    if version is None:
        return kept[-1][0]
    for path, state in kept:
        if state.policy_version == version:
            return path
    versions = ", ".join(str(state.policy_version) for _, state in kept)
    raise ConfigError(f"--version {version}: not kept (versions with a checkpoint: {versions})")


def _convert(run_dir: RunDir, checkpoint: Path, dest: Path) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    from learners.checkpoint import export_hf
    from learners.lora import Lora
    from learners.model import load_policy
    from learners.policy_dir import CACHE_DIR, prepare

    config = config_file.load(run_dir.config)
    seed, place = config.run.seed, run_dir.policy
    policy_dir = prepare(config.policy, [], CACHE_DIR, place, seed, run_dir.models)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = load_policy(policy_dir, activation_checkpointing=False, lora=Lora.of(config))
        state = get_model_state_dict(policy)
        dcp.load({"model": state}, checkpoint_id=checkpoint)  # pyright: ignore
        set_model_state_dict(policy, state)
        export_hf(dest, policy.causal_lm, policy_dir, getattr(torch, config.policy.dtype))
    finally:
        dist.destroy_process_group()
