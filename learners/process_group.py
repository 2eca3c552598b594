"""On which device a rank of a learner runs, and how the ranks meet.

Invariant: a lone rank opens no port. Called once by every rank before it loads the policy.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]

from cluster.errors import ConfigError


def device_of(accelerator: str, rank: int) -> torch.device:
    """Of `rank` under `resources.accelerator`, made the current one when it is a GPU.

    Raises `ConfigError` when that must be a GPU and this process sees none.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("resources.accelerator is gpu, but this process sees no CUDA device")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def meet(
    device: torch.device, rank: int, world_size: int, store: Store | None, timeout_s: float
) -> None:
    """Join the default process group; all ranks have the same `store`, a lone one needs none."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=HashStore() if store is None else store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
