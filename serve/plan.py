"""What a run will use, as rows a person can judge: actors, CPUs and GPUs, memory, capacity, tokens.

Invariant: the numbers come from `actors.placement` and the config, the same sources that the run
uses; memory is an estimate and says what it leaves out. Called by `serve.check`.
"""

import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from actors.placement import Placement
from cluster.config import Config

GIB = 1024**3
# The learner keeps float32 weights and, of what learns, gradients and two AdamW moments.
LEARNER_BYTES_PER_PARAMETER, FROZEN_BYTES_PER_PARAMETER = 16, 4
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def rows(
    config: Config, num_tasks: Mapping[str, int], longest_prompt: int, num_parameters: int
) -> list[tuple[str, str]]:
    """Rows (name, value) of the plan."""
    placement = Placement.of(config)
    rollout, learner = config.rollout, config.learner
    per_step = rollout.groups_per_step * rollout.group_size
    most = per_step * (rollout.max_new_tokens + longest_prompt)
    sampled = per_step * rollout.max_new_tokens
    devices = f"{placement.total_gpus:g} GPUs, " if placement.is_gpu else ""
    return [
        ("policy", f"{config.policy.type}, {num_parameters / 1e6:,.1f} M parameters"),
        ("tasks", ", ".join(f"{count} {split}" for split, count in num_tasks.items())),
        ("steps", f"{config.run.steps}, evaluation every {config.eval.every}"),
        (
            "actors",
            f"{rollout.workers} rollout, {config.rewards.workers} reward{_pools(config)}, "
            f"{learner.world_size} learner, 1 controller",
        ),
        ("devices", f"{devices}{placement.total_cpus} CPUs of {available_cpus(config)}"),
        ("placement", _places(placement)),
        ("learner memory", _learner_memory(config, num_parameters)),
        ("engine memory", _engine_memory(config, placement, num_parameters)),
        (
            "batch",
            f"{rollout.groups_per_step} groups x {rollout.group_size} = {per_step} trajectories, "
            f"at most {sampled:,} sampled and {most:,} trained tokens a step",
        ),
        ("longest prompt", f"{longest_prompt} of {config.policy.context_length} tokens"),
        (
            "capacity",
            f"{config.max_groups_in_flight} groups in flight (policy age at most "
            f"{rollout.max_policy_age}), buffer holds {config.buffer.capacity_groups}",
        ),
        ("weight sync", f"{config.sync.transport}, in flight, probed"),
    ]


def _pools(config: Config) -> str:
    pools = {name: v.pool for name, v in config.rewards.verifiers.items() if v.pool}
    listed = ", ".join(f"{name} {pool.workers}" for name, pool in pools.items())
    return f" + pools ({listed})" if listed else ""


def available_cpus(config: Config) -> int:
    """CPUs that a local Ray offers: `resources.cpus`, or all cores."""
    return config.resources.cpus or os.cpu_count() or 1


def available_gpus() -> int:
    """GPUs that the NVIDIA driver of this machine lists."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def num_parameters(policy_dir: Path) -> int:
    """Parameters of the safetensors files in a policy directory, from their headers."""
    total = 0
    for path in policy_dir.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        )
    return total


def _places(placement: Placement) -> str:
    """Each role's bundles, and whether they are packed or spread over nodes."""
    requests = [*placement.requests(), *placement.reward_requests()]
    return "; ".join(f"{r.role} {r} ({r.strategy.lower()})" for r in requests)


def _learner_memory(config: Config, num_parameters: int) -> str:
    world_size = config.learner.world_size
    num_trained, what = (1, "") if config.critic is None else (2, " of policy and critic")
    is_lora = config.learner.lora is not None
    size = FROZEN_BYTES_PER_PARAMETER if is_lora else LEARNER_BYTES_PER_PARAMETER
    parts = "frozen weights" if is_lora else "weights, gradients and AdamW"
    gib = num_trained * num_parameters * size / world_size / GIB
    return f"about {gib:.2f} GiB a rank for {parts}{what}, plus activations"


def _engine_memory(config: Config, placement: Placement, num_parameters: int) -> str:
    rollout = config.rollout
    if placement.is_gpu:
        return f"{rollout.gpu_memory_fraction:.0%} of each GPU of {rollout.workers} worker(s)"
    weights = num_parameters * _BYTES[config.policy.dtype] / GIB
    return (
        f"about {weights:.2f} GiB weights + {rollout.kv_cache_gib:g} GiB KV cache "
        f"for each of {rollout.workers} worker(s), plus the runtime"
    )
