"""Weights as a stream of buckets: what is packed comes out again, nothing undeclared is sent."""

import pytest
import torch
from torch import Tensor

from cluster.errors import StageError
from learners.weight_stream import Entry, entry, num_bytes, packed, unpacked

CPU = torch.device("cpu")


def make_tensors() -> list[tuple[str, Tensor]]:
    """Odd sizes and both types side by side, so that entries begin anywhere in a bucket."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 5), (7,), (), (1, 1, 11), (64, 33), (0, 4), (2,)]
    types = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16] * 2
    made = [
        (f"layer.{i}", torch.randn(shape, generator=generator).to(type_))
        for i, (shape, type_) in enumerate(zip(shapes, types, strict=False))
    ]
    return [*made, ("transposed", torch.randn(5, 9, generator=generator).T)]


def declared(tensors: list[tuple[str, Tensor]]) -> list[Entry]:
    return [entry(name, tensor.dtype, tensor.shape) for name, tensor in tensors]


@pytest.mark.parametrize("bucket_bytes", [1, 7, 64, 1000, 1 << 20])
def test_what_is_packed_is_unpacked(bucket_bytes: int) -> None:
    """In buckets far smaller than a tensor and in one that holds all."""
    tensors = make_tensors()
    manifest = [list(each) for each in declared(tensors)]  # as it arrives: no tuples
    size = min(bucket_bytes, num_bytes(manifest))
    buckets = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
    sent = [piece.clone() for piece in packed(tensors, manifest, buckets)]
    assert sum(len(piece) for piece in sent) == num_bytes(manifest)
    assert all(len(piece) == size for piece in sent[:-1])
    pieces = iter(sent)
    received = list(unpacked(manifest, size, CPU, lambda bucket: bucket.copy_(next(pieces))))
    assert next(pieces, None) is None
    for (name, before), (found, after) in zip(tensors, received, strict=True):
        assert (name, before.dtype, before.shape) == (found, after.dtype, after.shape)
        assert torch.equal(before, after)


def test_a_bucket_on_its_way_is_left_alone() -> None:
    """The one yielded before stays as it was while the next is filled."""
    tensors = make_tensors()
    buckets = [torch.empty(100, dtype=torch.uint8) for _ in range(2)]
    before: tuple[Tensor, Tensor] | None = None
    for piece in packed(tensors, declared(tensors), buckets):
        if before is not None:
            assert torch.equal(*before)
        before = piece, piece.clone()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("other", torch.zeros(3, 5, dtype=torch.bfloat16), r"has other .* for layer\.0"),
        ("layer.0", torch.zeros(3, 5), r"layer\.0 \(float32 \[3, 5\]\) for .*bfloat16"),
        ("layer.0", torch.zeros(5, 3, dtype=torch.bfloat16), r"\[5, 3\]\) for .*\[3, 5\]"),
    ],
    ids=["name", "type", "shape"],
)
def test_a_tensor_unlike_the_manifest_is_named_before_anything_is_sent(
    name: str, tensor: Tensor, message: str
) -> None:
    tensors = make_tensors()
    manifest = declared(tensors)
    buckets = [torch.empty(8, dtype=torch.uint8) for _ in range(2)]
    sent: list[Tensor] = []
    with pytest.raises(StageError, match=message):
        sent.extend(packed([(name, tensor), *tensors[1:]], manifest, buckets))
    assert sent == []


def test_a_stream_of_another_length_is_refused() -> None:
    tensors = make_tensors()
    bucket = [torch.empty(1 << 20, dtype=torch.uint8)]
    with pytest.raises(StageError, match="ends before transposed"):
        list(packed(tensors[:-1], declared(tensors), bucket))
    with pytest.raises(StageError, match="goes on with transposed"):
        list(packed(tensors, declared(tensors)[:-1], bucket))


def test_only_types_of_tensors_are_looked_up() -> None:
    with pytest.raises(StageError, match="load is no type of tensors"):
        num_bytes([("layer.0", "load", [1])])
