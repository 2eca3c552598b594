"""The learner's end of a broadcast of weights.

Invariant: all ranks walk the tensors to the end whatever becomes of the broadcast, so that a broken
group never leaves them at different collectives. Owned by a learner rank; the engines' end is
`actors.weight_transfer`, `actors.weight_broadcast` brings both together.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cluster.errors import StageError, boundary
from learners import weight_source
from learners.rendezvous import open_store
from learners.transfer_group import TransferGroup
from learners.weight_stream import BUCKET_BYTES, Entry, num_bytes, packed


class WeightSender:
    """Sends the weights of `module` in `dtype`; one per learner rank, of which `is_sender` alone
    is a member of the group.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, is_sender: bool
    ) -> None:
        self._module, self._dtype, self._device = module, dtype, device
        self._is_sender = is_sender
        self._store: TCPStore | None = None
        self._group: TransferGroup | None = None
        self._timeout_s = 0.0
        self._num_bytes = 0  # of a bucket of this group
        self._manifest: list[Entry] = []
        self.bucket_bytes = BUCKET_BYTES

    def open(self, host: str, timeout_s: float) -> tuple[str, int]:
        """End the group before and open a port for the next to meet at: "host", port. No step of
        meeting or sending waits longer than `timeout_s`.
        """
        self.close()
        self._timeout_s = timeout_s
        with boundary("sync"):
            self._store = open_store(host, timeout_s)
            return host, self._store.port

    def join(self, size: int) -> dict[str, Any]:
        """Meet the `size - 1` workers of engines; what they must be told with each broadcast, as
        plain data.
        """
        if self._store is None:
            raise StageError("sync", "no port is open for a group to meet at")
        try:
            self._group = TransferGroup(self._store, 0, size, self._device, self._timeout_s)
        except StageError:
            self.close()
            raise
        self._manifest = weight_source.manifest(self._module, self._dtype)
        self._num_bytes = min(self.bucket_bytes, num_bytes(self._manifest))
        return {"manifest": self._manifest, "bucket_bytes": self._num_bytes}

    def send(self) -> None:
        """Broadcast the weights; all ranks must call it. A failure ends the group."""
        tensors = weight_source.full_tensors(self._module, self._dtype)
        try:
            if self._is_sender:
                self._send(tensors)
        except Exception:
            self.close()
            raise
        finally:
            for _ in tensors:
                pass

    def _send(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        if self._group is None:
            raise StageError("sync", "no group of engines has met")
        with boundary("sync"):
            buckets = [
                torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(2)
            ]
        self._group.start()
        for bucket in packed(tensors, self._manifest, buckets):
            self._group.end()
            self._group.begin(bucket)
        self._group.end()

    def close(self) -> None:
        """Break the group off and close its port."""
        if self._group is not None:
            self._group.close()
        self._group = self._store = None
