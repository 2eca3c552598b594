"""Attention over packed sequences where flash attention cannot run: SDPA on rows that are padded
for it alone.

Invariant: a token attends to those before it in its own sequence, and to nothing else. All other
layers of the decoder see packed tokens, so padding costs nothing but attention, and neighbours are
padded together only while the longest is at most twice the shortest. Chosen by `learners.model`.
"""

# ruff: noqa: F722 (shapes in annotations)

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "packed_sdpa"


@dataclass(frozen=True)
class Block:
    """Neighbouring sequences, tokens `start` to `stop` of the pack; `places` are theirs in rows of
    `longest` tokens, None where no row needs padding.
    """

    start: int
    stop: int
    num_rows: int
    longest: int
    places: Int[Tensor, " n"] | None


def blocks(lengths: Sequence[int], device: torch.device) -> list[Block]:
    """Sequences of these lengths, end to end: [8, 5, 4, 1] makes two blocks, [8, 5, 4] and [1]."""
    found: list[Block] = []
    start = 0
    for part in _alike(lengths):
        stop, longest = start + sum(part), max(part)
        places = None
        if min(part) < longest:
            counts = torch.tensor(part)
            padding = (longest - counts).cumsum(0) - (longest - counts)  # before each row
            places = torch.arange(stop - start) + padding.repeat_interleave(counts)
            places = places.to(device)
        found.append(Block(start, stop, len(part), longest, places))
        start = stop
    return found


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive lengths, cut before one that would make the longest over twice the shortest."""
    part: list[int] = []
    for length in lengths:
        if part and max(*part, length) > 2 * min(*part, length):
            yield part
            part = []
        part.append(length)
    yield part


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 G T D"],
    value: Float[Tensor, "1 G T V"],
    attention_mask: None,
    *,
    packed_blocks: Sequence[Block],
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "1 T H V"], None]:
    """As `transformers` calls it; `packed_blocks`, `blocks` of the pack, were given to the decoder.

    H heads for queries, G for keys and values. Raises `ValueError` for a mask: it says something of
    the decoder that is not known here.
    """
    if attention_mask is not None:
        raise ValueError("a mask of the decoder's own")
    outputs: list[Tensor] = []
    for block in packed_blocks:
        q, k, v = (_rows(states[0].transpose(0, 1), block) for states in (query, key, value))
        mask = _window(block.longest, sliding_window, query.device)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=True, **settings)
        flat = output.flatten(0, 1)
        outputs.append(flat if block.places is None else flat.index_select(0, block.places))
    return torch.cat(outputs)[None], None


def _rows(states: Float[Tensor, "T H D"], block: Block) -> Float[Tensor, "S H L D"]:
    tokens = states[block.start : block.stop]
    if block.places is not None:
        padded = tokens.new_zeros(block.num_rows * block.longest, *tokens.shape[1:])
        tokens = padded.index_copy(0, block.places, tokens)
    return tokens.unflatten(0, (block.num_rows, block.longest)).transpose(1, 2)


@lru_cache(maxsize=2)  # on the device, one for a pack of alike sequences
def _window(length: int, size: int | None, device: torch.device) -> Tensor | None:
    """Which of `length` tokens each may see, itself included; None where it is all before it."""
    if size is None or length <= size:
        return None
    all_pairs = torch.ones(length, length, dtype=torch.bool, device=device)
    return all_pairs.tril().triu(1 - size)


AttentionInterface.register(NAME, packed_attention)
