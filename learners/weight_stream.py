"""The weights as one stream of bytes in buckets, and the manifest that cuts it up again.

Invariant: the stream is the manifest's tensors in its order, without gaps; no byte of a tensor is
packed before its name, type and shape have been compared with the manifest. Plain tensors and plain
data, on whatever device: the learner packs, engines unpack.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cluster.errors import StageError

BUCKET_BYTES = 256 * 2**20
Entry = tuple[str, str, list[int]]  # name, type as `torch` names it, shape


def entry(name: str, dtype: torch.dtype, shape: Iterable[int]) -> Entry:
    return name, str(dtype).removeprefix("torch."), list(shape)


def num_bytes(manifest: Iterable[Entry]) -> int:
    return sum(math.prod(shape) * _dtype(type_).itemsize for _, type_, shape in manifest)


def packed(
    tensors: Iterable[tuple[str, Tensor]], manifest: Sequence[Entry], buckets: Sequence[Tensor]
) -> Iterator[Tensor]:
    """The stream, piece by piece, each a full one of `buckets` (bytes [B]) except the last.

    The buckets take turns, so the one yielded before may still be on its way when the next is
    yielded, but no longer when another is asked for. Raises `StageError` that names the first
    tensor that is not what `manifest` says.
    """
    expected, turns = iter(manifest), itertools.cycle(buckets)
    bucket, filled = next(turns), 0
    for name, tensor in tensors:
        _check(next(expected, None), entry(name, tensor.dtype, tensor.shape))
        rest = _bytes_of(tensor)
        while len(rest):
            part = rest[: len(bucket) - filled]
            bucket[filled : filled + len(part)].copy_(part)
            filled, rest = filled + len(part), rest[len(part) :]
            if filled == len(bucket):
                yield bucket
                bucket, filled = next(turns), 0
    if (missing := next(expected, None)) is not None:
        raise StageError("sync", f"the stream of weights ends before {missing[0]}")
    if filled:
        yield bucket[:filled]


def unpacked(
    manifest: Sequence[Entry],
    bucket_bytes: int,
    device: torch.device,
    receive: Callable[[Tensor], None],
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) of each entry; `receive` fills a bucket with the next bytes.

    Every tensor has memory of its own: engines keep some until the rest of their layer is there.
    """
    left = num_bytes(manifest)
    bucket = torch.empty(min(bucket_bytes, left), dtype=torch.uint8, device=device)
    arrived = bucket[:0]
    for name, type_, shape in manifest:
        tensor = torch.empty(shape, dtype=_dtype(type_), device=device)
        rest = _bytes_of(tensor)
        while len(rest):
            if not len(arrived):
                arrived = bucket[:left]
                receive(arrived)
                left -= len(arrived)
            part = arrived[: len(rest)]
            rest[: len(part)].copy_(part)
            arrived, rest = arrived[len(part) :], rest[len(part) :]
        yield name, tensor


def _check(expected: Entry | None, found: Entry) -> None:
    if expected is None:
        raise StageError("sync", f"the stream of weights goes on with {found[0]}, not declared")
    if tuple(expected) != found:
        raise StageError("sync", f"the stream of weights has {_say(found)} for {_say(expected)}")


def _say(entry: Entry) -> str:
    name, type_, shape = entry
    return f"{name} ({type_} {shape})"


def _bytes_of(tensor: Tensor) -> Tensor:
    """Bytes [N]; the same memory if `tensor` is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StageError("sync", f"{name} is no type of tensors")
    return dtype
