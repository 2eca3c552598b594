"""What each actor gets: CPUs, GPUs, environment and engine settings, derived from the config in
one place.

Invariant: `Placement.of(config)` decides CPU or GPU once; nobody else asks. Called by the
launcher, the fleet and `hone check`, which prints the same numbers that the run will use.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import Config

# Kept out of every process of a run: telemetry and model-hub look-ups nobody asked for.
QUIET_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class EngineSettings:
    """What a vLLM engine needs to start. `kv_cache_gib` counts on CPU, `gpu_memory_fraction` on
    GPU.
    """

    policy_dir: Path
    dtype: str
    context_length: int
    tensor_parallel_size: int
    is_gpu: bool
    kv_cache_gib: float
    gpu_memory_fraction: float
    max_num_seqs: int


@dataclass(frozen=True)
class Placement:
    """Resources of a run on this kind of machine."""

    config: Config
    is_gpu: bool

    @classmethod
    def of(cls, config: Config) -> "Placement":
        """`resources.accelerator: auto` means GPU where the NVIDIA driver is installed."""
        wanted = config.resources.accelerator
        is_gpu = wanted == "gpu" or (wanted == "auto" and shutil.which("nvidia-smi") is not None)
        return cls(config, is_gpu)

    @property
    def rollout_cpus(self) -> int:
        return 1

    @property
    def rollout_gpus(self) -> int:
        """GPUs of one rollout worker: its tensor-parallel ranks."""
        return self.config.rollout.tensor_parallel_size if self.is_gpu else 0

    @property
    def total_cpus(self) -> int:
        return self.config.rollout.workers * self.rollout_cpus + self.config.learner.world_size

    @property
    def total_gpus(self) -> int:
        learner = self.config.learner.world_size if self.is_gpu else 0
        return self.config.rollout.workers * self.rollout_gpus + learner

    @property
    def threads_per_process(self) -> int:
        """Math threads of a learner rank or engine on CPU, so that together they fill the cores."""
        cores = self.config.resources.cpus or os.cpu_count() or 1
        return max(1, cores // self.total_cpus)

    def rollout_options(self) -> dict[str, Any]:
        env = QUIET_ENV | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        if not self.is_gpu:
            env |= {
                "OMP_NUM_THREADS": str(self.threads_per_process),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_ATTN_SPLIT_KV": "0",  # equal bits whatever else is in the batch
            }
        return {
            "num_cpus": self.rollout_cpus,
            "num_gpus": self.rollout_gpus,
            "runtime_env": {"env_vars": env},
            "max_restarts": 0,  # the fleet re-creates it: Ray's restart would skip the sync
        }

    def learner_options(self) -> dict[str, Any]:
        env = QUIET_ENV if self.is_gpu else QUIET_ENV | {"OMP_NUM_THREADS": "1"}
        return {
            "num_cpus": 1,
            "num_gpus": int(self.is_gpu),
            "runtime_env": {"env_vars": env},
            "max_restarts": 0,
        }

    def reward_options(self) -> dict[str, Any]:
        """Reward workers are light: they wait for their own killable check processes."""
        return {"num_cpus": 0, "runtime_env": {"env_vars": QUIET_ENV}, "max_restarts": -1}

    def engine_settings(self, policy_dir: Path) -> EngineSettings:
        config = self.config
        per_worker = -(-config.max_groups_in_flight // config.rollout.workers)
        return EngineSettings(
            policy_dir=policy_dir,
            dtype=config.policy.dtype,
            context_length=config.policy.context_length,
            tensor_parallel_size=config.rollout.tensor_parallel_size,
            is_gpu=self.is_gpu,
            kv_cache_gib=config.rollout.kv_cache_gib,
            gpu_memory_fraction=config.rollout.gpu_memory_fraction,
            max_num_seqs=min(1024, max(16, per_worker * config.rollout.group_size)),
        )
