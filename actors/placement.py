"""What each actor gets: CPUs, GPUs, environment and engine settings, derived from the config in
one place.

Invariant: `Placement.of(config)` decides CPU or GPU once; nobody else asks. Called by the
launcher, the fleet and `hone check`, which prints the same numbers that the run will use.
"""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Config
from cluster.environment import installed

if TYPE_CHECKING:
    from actors.gang import Gang

# For every process of a run: no telemetry, no model-hub look-ups nobody asked for, and math threads
# that soon sleep while they wait for each other. By default they spin, on the core that the last of
# them needs: beside any other work a step then takes many times as long. Always to sleep at once
# costs the step of a small model much of its time when nothing else runs.
QUIET_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "3000",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


# A process that talks to no other rank need not listen where other hosts could reach it.
ALONE_ENV = {"GLOO_SOCKET_IFNAME": "lo"}
COLOCATED = "learner and rollout"  # the group of bundles that hold one of each


@dataclass(frozen=True)
class BundleRequest:
    """`count` equal bundles, each on one node; together or not at all.

    Example: `BundleRequest("rollout", 4, {"CPU": 1, "GPU": 2}, {"pool": "gpu"}, "SPREAD",
    "rollout.workers")` asks for four engines of two GPUs.
    """

    role: str
    count: int
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    strategy: str  # PACK or SPREAD
    knobs: str  # the config keys that change it

    def __str__(self) -> str:
        amounts = " + ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        labels = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        return f"{self.count} x {amounts or 'a place'}" + (f" on {labels}" if labels else "")


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
    can_sleep: bool = False  # on GPU


@dataclass(frozen=True)
class Placement:
    """Resources of a run on this kind of machine; with a `gang`, also where its actors go.

    `resources.layout` split gives each learner rank a GPU and each engine its own; colocated and
    alternating let rank i and engine i share one. Reward workers keep away from GPU nodes where
    they can.
    """

    config: Config
    is_gpu: bool
    gang: "Gang | None" = None
    reward_selector: dict[str, str] | None = None  # None: as `resources.labels` says

    @classmethod
    def of(cls, config: Config, cluster_gpus: float | None = None) -> "Placement":
        """`resources.accelerator: auto` means GPU where vLLM is installed for GPUs and the cluster
        has `cluster_gpus`, or, with none known, this machine has the NVIDIA driver.
        """
        wanted = config.resources.accelerator
        has_gpus = bool(cluster_gpus) if cluster_gpus is not None else shutil.which("nvidia-smi")
        can_use = installed("vllm") is not None  # a CPU build is another package
        return cls(config, wanted == "gpu" or (wanted == "auto" and can_use and bool(has_gpus)))

    @property
    def is_colocated(self) -> bool:
        return self.config.resources.layout != "split"

    @property
    def is_alternating(self) -> bool:
        """Engines sleep while the learner works; see `actors.turns`."""
        return self.config.resources.layout == "alternating"

    @property
    def rollout_cpus(self) -> int:
        return 1

    @property
    def rollout_gpus(self) -> float:
        """GPUs of one rollout worker: its tensor-parallel ranks, or its share of a GPU."""
        if not self.is_gpu:
            return 0
        share = self.config.resources.engine_gpu_share
        return self.config.rollout.tensor_parallel_size * share

    @property
    def learner_gpus(self) -> float:
        """GPUs of one learner rank: the rest of the engine's when they share one."""
        if not self.is_gpu:
            return 0
        return 1 - self.config.resources.engine_gpu_share if self.is_colocated else 1

    @property
    def total_cpus(self) -> int:
        reserved = sum(r.count * r.resources["CPU"] for r in self.requests())
        return math.ceil(reserved) + self._pooled("cpus")

    @property
    def total_gpus(self) -> float:
        reserved = sum(r.count * r.resources.get("GPU", 0.0) for r in self.requests())
        return reserved + self._pooled("gpus")

    def _pooled(self, share: str) -> int:
        """CPUs or GPUs of all verifiers' pools at their upper bounds."""
        pools = [v.pool for v in self.config.rewards.verifiers.values() if v.pool]
        return math.ceil(sum(pool.bounds[1] * getattr(pool, share) for pool in pools))

    @property
    def reward_labels(self) -> dict[str, str]:
        labels = self.config.resources.labels.get("reward", {})
        return labels or self.reward_selector or {}

    def requests(self) -> list[BundleRequest]:
        """The bundles that a run reserves before it starts anything, in the order of asking."""
        labels = self.config.resources.labels
        ranks, engines = self.config.learner.world_size, self.config.rollout.workers
        if self.is_colocated:
            return [
                BundleRequest(
                    COLOCATED,
                    max(ranks, engines),
                    _amounts(1 + self.rollout_cpus, int(self.is_gpu)),
                    labels.get("learner", {}) | labels.get("rollout", {}),
                    "PACK",
                    "learner.world_size, rollout.workers, resources.labels",
                )
            ]
        return [
            BundleRequest(
                "learner",
                ranks,
                _amounts(1, self.learner_gpus),
                labels.get("learner", {}),
                "PACK",
                "learner.world_size, resources.labels.learner",
            ),
            BundleRequest(
                "rollout",
                engines,
                _amounts(self.rollout_cpus, self.rollout_gpus),
                labels.get("rollout", {}),
                "SPREAD",
                "rollout.workers, rollout.tensor_parallel_size, resources.labels.rollout",
            ),
        ]

    def reward_requests(self) -> list[BundleRequest]:
        """What is not reserved but has to fit: reward workers, which need a node with the right
        labels and nothing of it, and verifier pools at their smallest.
        """
        rewards = self.config.rewards
        workers = BundleRequest(
            "reward", rewards.workers, {}, self.reward_labels, "SPREAD", "resources.labels.reward"
        )
        pools = [
            BundleRequest(
                f"the pool of {name}",
                verifier.pool.bounds[0],
                _amounts(verifier.pool.cpus, verifier.pool.gpus),
                {} if verifier.pool.gpus else self.reward_labels,
                "SPREAD",
                f"rewards.verifiers.{name}.pool",
            )
            for name, verifier in rewards.verifiers.items()
            if verifier.pool is not None
        ]
        return [workers, *pools]

    @property
    def threads_per_process(self) -> int:
        """Math threads of an engine on CPU, so that engines and learner ranks, which have one each,
        fill the cores.
        """
        cores = self.config.resources.cpus or os.cpu_count() or 1
        return max(1, cores // self.total_cpus)

    def rollout_options(self, index: int = 0, place: str = "rollout") -> dict[str, Any]:
        """Ray options of rollout worker `index`, in the reserved bundles `place`."""
        env = QUIET_ENV | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        if self.config.rollout.tensor_parallel_size == 1:
            env |= ALONE_ENV
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
        } | self._place(place, index if self.is_colocated else -1)

    def learner_options(self) -> dict[str, Any]:
        env = QUIET_ENV if self.is_gpu else QUIET_ENV | {"OMP_NUM_THREADS": "1"}
        env = env | ALONE_ENV if self.config.learner.world_size == 1 else env
        return {
            "num_cpus": 1,
            "num_gpus": self.learner_gpus,
            "runtime_env": {"env_vars": env},
            "max_restarts": 0,
        } | self._place("learner", -1)

    def reward_options(self) -> dict[str, Any]:
        """What reward workers and verifier pools share. They are light: they wait for killable
        check processes of their own. Who starts one says whether Ray restarts it.
        """
        return {
            "num_cpus": 0,
            "runtime_env": {"env_vars": QUIET_ENV},
            "scheduling_strategy": "SPREAD",
            "label_selector": self.reward_labels or None,
        }

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
            can_sleep=self.is_alternating,
        )

    def _place(self, role: str, index: int) -> dict[str, Any]:
        if self.gang is None:
            return {}
        return {"scheduling_strategy": self.gang.strategy(self._group_of(role), index)}

    def _group_of(self, role: str) -> str:
        return COLOCATED if self.is_colocated else role


def on_this_machine(config: Config) -> Config:
    """`config` for a Ray of one's own: its single node has no labels to ask for."""
    here = config.resources.model_copy(update={"labels": {}})
    return config.model_copy(update={"resources": here})


def _amounts(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
