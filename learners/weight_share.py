"""Weights from each learner rank to the engine on its own device, through memory that both see.

Invariant: all ranks walk the tensors to the end whatever becomes of one, so that none is left at a
collective; the copy of the weights is gone when `close` returns. Owned by a learner rank and, the
other end, called by `actors.weight_transfer`; `actors.weight_sharing` brings both together.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import StageError, boundary
from learners import weight_source
from learners.shared_buffer import Handle, SharedBuffer, device_name, opened
from learners.weight_stream import BUCKET_BYTES, Entry, num_bytes, packed, unpacked


class WeightShare:
    """A copy of the weights of `module` in `dtype`, for as long as engines take them over."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._module, self._dtype, self._device = module, dtype, device
        self._buffer: SharedBuffer | None = None

    def open(self) -> dict[str, Any]:
        """Copy the weights; where they lie and what they are, as plain data. All ranks call it.
        Raises `StageError`, as when the copy has no room.
        """
        self.close()
        manifest = weight_source.manifest(self._module, self._dtype)
        tensors = weight_source.full_tensors(self._module, self._dtype)
        try:
            with boundary("sync"):
                self._buffer = buffer = SharedBuffer(num_bytes(manifest), self._device)
                for _ in packed(tensors, manifest, [buffer.data]):
                    pass
                handle = buffer.handle()
        except StageError:
            self.close()
            raise
        finally:
            for _ in tensors:
                pass
        return {"device": device_name(self._device), "handle": handle, "manifest": manifest}

    def close(self) -> None:
        """Give the memory of the copy back, if there is one."""
        if self._buffer is not None:
            self._buffer.close()
        self._buffer = None


def shared_tensors(
    manifest: Sequence[Entry], handles: Mapping[str, Handle], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) of each entry, in memory of its own; `handles` by device name."""
    name = device_name(device)
    if name not in handles:
        raise StageError("sync", f"no learner rank shares the memory of {name}")
    left = opened(handles[name], num_bytes(manifest), device)

    def receive(bucket: Tensor) -> None:
        nonlocal left
        bucket.copy_(left[: len(bucket)])
        left = left[len(bucket) :]

    return unpacked(manifest, BUCKET_BYTES, device, receive)
