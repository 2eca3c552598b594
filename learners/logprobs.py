"""Log-probabilities and entropies from hidden states, without ever holding all logits.

Invariant: values and gradients are exact and do not depend on the chunk size; logits are upcast to
float32 (or kept in float64) before temperature and log-sum-exp. The only place that turns hidden
states into probabilities; called by `learners.model`.
"""

# ruff: noqa: F722 (shapes in annotations)

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**27  # logits held at once: 4 MiB near the caches, 512 MiB


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, " N"],
    temperature: Float[Tensor, " N"],
    chunk_rows: int | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log p(label) and the entropy in nats of softmax(hidden @ head.T / temperature), per row.

    Gradients flow to `hidden` and `head` through both; a result that no loss uses costs nothing in
    the backward pass. Memory is O(chunk_rows * V) beside the inputs.
    """
    if chunk_rows is None:
        budget = _CPU_CHUNK if hidden.device.type == "cpu" else _GPU_CHUNK
        chunk_rows = max(1, budget // head.shape[0])
    return _TokenLogprobs.apply(hidden, head, labels, temperature, chunk_rows)  # type: ignore[return-value]


def _logits(hidden: Tensor, head: Tensor, temperature: Tensor) -> Tensor:
    logits = hidden @ head.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / temperature[:, None]


class _TokenLogprobs(torch.autograd.Function):
    """Backward recomputes each chunk's logits z: dl/dz = 1_label - p, dH/dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        temperature: Tensor,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        entropy, normalizer = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = _logits(hidden[rows], head, temperature[rows])
            normalizer[rows] = logits.logsumexp(-1)
            logits -= normalizer[rows, None]
            logprobs[rows] = logits.gather(-1, labels[rows, None]).squeeze(-1)
            entropy[rows] = -(logits.exp() * logits).sum(-1)
        ctx.save_for_backward(hidden, head, labels, temperature, normalizer, entropy)
        ctx.chunk_rows = chunk_rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_logprobs, of_entropy = gradients
        hidden, head, labels, temperature, normalizer, entropy = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden)
        of_head = torch.zeros_like(head, dtype=normalizer.dtype)
        for start in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            log_p = _logits(hidden[rows], head, temperature[rows]) - normalizer[rows, None]
            p = log_p.exp()
            of_logits = torch.zeros_like(p)
            if of_logprobs is not None:
                of_logits -= p * of_logprobs[rows, None]
                of_logits.scatter_add_(-1, labels[rows, None], of_logprobs[rows, None])
            if of_entropy is not None:
                of_logits -= p * (log_p + entropy[rows, None]) * of_entropy[rows, None]
            of_logits = (of_logits / temperature[rows, None]).to(hidden.dtype)
            of_hidden[rows] = of_logits @ head
            of_head += of_logits.T @ hidden[rows]
        return of_hidden, of_head.to(head.dtype), None, None, None
