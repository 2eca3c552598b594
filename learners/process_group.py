"""How the ranks of a learner meet.

Invariant: a lone rank opens no port, because torch's rendezvous asks nobody for a password. Called
once by every rank before it loads the policy.
"""

from datetime import timedelta

import torch
import torch.distributed as dist


def meet(device: torch.device, rank: int, world_size: int, master: str, timeout_s: float) -> None:
    """Join the default process group; `master` is "host:port" of rank 0."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    dist.init_process_group(
        backend, init_method=f"tcp://{master}", rank=rank, world_size=world_size, timeout=timeout
    )
