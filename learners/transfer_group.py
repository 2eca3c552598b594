"""The group over which weights travel: rank 0 of the learner sends, workers of engines receive.

Invariant: it is known to nobody but its members (torch's default group stays what it is), and no
wait in it outlives its deadline. gloo on CPUs, NCCL on GPUs: nothing else differs. Ports open on
one address each, that by which the members reach each other.
"""

import socket
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    ProcessGroup,
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.distributed_c10d import BroadcastOptions, Work

from cluster.errors import StageError, boundary

MARGIN_S = 5.0  # by which NCCL's watchdog, which ends the process, comes after the deadline


class TransferGroup:
    """One member; comes to be when all `size` members have met. Raises `StageError`."""

    def __init__(
        self, store: TCPStore, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self._timeout_s = timeout_s
        self._work: Work | None = None
        self.start()
        with boundary("sync"):
            make = _nccl if device.type == "cuda" else _gloo
            self._group: ProcessGroup | None = make(store, rank, size, timeout_s)
        try:
            self.receive(torch.zeros(1, dtype=torch.uint8, device=device))  # NCCL connects only now
        except StageError:
            self.close()
            raise

    def start(self) -> None:
        """One transfer begins: the deadline counts from here."""
        self._deadline = time.monotonic() + self._timeout_s

    def begin(self, bucket: Tensor) -> None:
        """Start to send `bucket` (rank 0) or to fill it (the others); one at a time."""
        with boundary("sync"):
            if self._group is None:
                raise ConnectionError("the group for weights has ended")
            options = BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            options.timeout = self._left
            self._work = self._group.broadcast([bucket], options)

    def end(self) -> None:
        """Wait until the bucket has been sent or filled."""
        try:
            with boundary("sync"):
                if self._work is not None:
                    self._work.wait(self._left)
        finally:
            self._work = None  # it would keep the connections of a broken group open

    def receive(self, bucket: Tensor) -> None:
        """Both, at once."""
        self.begin(bucket)
        self.end()

    def close(self) -> None:
        """Break off: the other members' waits end with an error."""
        self._work = None
        if self._group is not None:
            self._group.abort()  # NCCL; gloo closes its connections with the last reference
        self._group = None

    @property
    def _left(self) -> timedelta:
        return timedelta(seconds=max(0.001, self._deadline - time.monotonic()))


def _gloo(store: TCPStore, rank: int, size: int, timeout_s: float) -> ProcessGroup:
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    kind: Any = ProcessGroupGloo
    options = kind._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [kind.create_device(hostname=_address_towards(store.host, store.port))]
    backend = kind(store, rank, size, options)
    return _group(store, rank, size, ProcessGroup.BackendType.GLOO, backend, "cpu")


def _nccl(store: TCPStore, rank: int, size: int, timeout_s: float) -> ProcessGroup:
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s + MARGIN_S)
    backend = ProcessGroupNCCL(store, rank, size, options)
    return _group(store, rank, size, ProcessGroup.BackendType.NCCL, backend, "cuda")


def _group(
    store: Store, rank: int, size: int, kind: ProcessGroup.BackendType, backend: Any, device: str
) -> ProcessGroup:
    group = ProcessGroup(store, rank, size)
    group._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    group._register_backend(torch.device(device), kind, backend)
    return group


def _address_towards(host: str, port: int) -> str:
    """The address of this machine that faces `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
