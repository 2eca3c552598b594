"""Full weights out of a sharded model: a stream of whole tensors, what it will hold, and a
safetensors file of it.

Invariant: all ranks walk the tensors in the same order (each is gathered collectively), one whole
tensor at a time; tied weights appear once, and adapters as part of the weight that they stand
beside; a file that exists under its name is complete. Called by weight sync and export.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learners.weight_stream import Entry, entry

ADAPTER, BASE = "default", ".base_layer"  # as `peft` names them
_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def full_tensors(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every weight, on its device in `dtype`; all ranks in lockstep."""
    for name, parameter, adapted in _weights(module):
        if adapted is None:
            yield name, _whole(parameter.detach().to(dtype))  # rounded before it is gathered
            continue
        down, up = adapted.lora_A[ADAPTER].weight, adapted.lora_B[ADAPTER].weight
        added = adapted.scaling[ADAPTER] * (_whole(up) @ _whole(down))
        yield name, (_whole(parameter) + added).to(dtype)


def manifest(module: nn.Module, dtype: torch.dtype) -> list[Entry]:
    """What `full_tensors` is going to yield; gathers nothing, so one rank may ask alone."""
    return [entry(name, dtype, parameter.shape) for name, parameter, _ in _weights(module)]


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Each parameter under the name that it has without adapters, and the `peft` layer that
    adapts it, if any.
    """
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(BASE):
            owner = owner.removesuffix(BASE)
            adapted = module.get_submodule(owner) if leaf == "weight" else None
            yield f"{owner}.{leaf}", parameter, adapted
        elif not owner.endswith(f".{ADAPTER}"):
            yield name, parameter, None


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    for name, parameter, _ in _weights(module):
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
