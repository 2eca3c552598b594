"""Full weights out of a sharded model: a stream of whole tensors, and a safetensors file of them.

Invariant: all ranks walk the tensors in the same order (each is gathered collectively), one whole
tensor at a time; tied weights appear once; a file that exists under its name is complete. Called by
weight sync and export.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def full_tensors(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every parameter, on its device in `dtype`; all ranks in lockstep."""
    for name, parameter in module.named_parameters():
        tensor = parameter.detach()
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(dtype)


def write_safetensors(module: nn.Module, path: Path, dtype: torch.dtype, is_writer: bool) -> None:
    """Write the weights to `path`; every rank must call it, the one with `is_writer` writes.

    Streams tensor by tensor, so host memory holds one of them; the file is renamed into place.
    """
    if not is_writer:
        for _ in full_tensors(module, dtype):
            pass
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(_header(module, dtype))
        for _, tensor in full_tensors(module, dtype):
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    temporary.replace(path)


def _header(module: nn.Module, dtype: torch.dtype) -> bytes:
    """Length and JSON of a safetensors file, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, parameter in module.named_parameters():
        end = start + parameter.numel() * dtype.itemsize
        entries[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": list(parameter.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
