"""Memory that two processes see: of the GPU that both use, by CUDA IPC, and on CPUs a mapped file.

Invariant: what has to be told to open it is plain data, nothing is unpickled; it lasts until its
owner closes it, by when whoever has opened it must have copied what they want.
"""

import os
import platform
import tempfile

import torch
from torch import Tensor

Handle = list[str | int | bool]  # bytes as hexadecimal text


def device_name(device: torch.device) -> str:
    """The same for two processes exactly if one can open what the other shares."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return f"{device.type} of {platform.node()}"


class SharedBuffer:
    """`data`: bytes [size] on `device`. The owner's side. Raises `OSError` or torch's error where
    there is no room.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._file = None
        self._counter: tuple[bytes, int] | None = None  # torch's, of who has yet to open it
        if device.type == "cuda":
            self.data = torch.empty(size, dtype=torch.uint8, device=device)
        else:
            self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
            try:
                os.posix_fallocate(self._file.fileno(), 0, size)  # a hole is a SIGBUS when touched
            except OSError:
                self._file.close()
                raise
            self.data = torch.from_file(self._file.name, shared=True, size=size, dtype=torch.uint8)

    def handle(self) -> Handle:
        """What `opened` needs; each GPU buffer is to be opened once. Its content is complete."""
        if self._file is not None:
            return [self._file.name]
        torch.cuda.synchronize(self.data.device)
        shared = self.data.untyped_storage()._share_cuda_()
        self._counter = shared[4], shared[5]
        return [part.hex() if isinstance(part, bytes) else part for part in shared]

    def close(self) -> None:
        """Give the memory back, also when nobody has opened it."""
        if self._counter is not None:  # it starts at 1, and else only who opens it lowers it
            torch.UntypedStorage._release_ipc_counter(*self._counter, device=self.data.device)
            self._counter = None
        self.data = self.data[:0].clone()
        if self._file is not None:
            self._file.close()
        else:
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()


def opened(handle: Handle, size: int, device: torch.device) -> Tensor:
    """Bytes [size] of the owner's buffer, not a copy; `device` is the same as the owner's."""
    if device.type != "cuda":
        return torch.from_file(str(handle[0]), shared=False, size=size, dtype=torch.uint8)
    _, *rest = handle  # the owner may count its GPUs in another way
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in rest]
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))
