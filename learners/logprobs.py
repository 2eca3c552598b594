"""Log-probabilities and entropies from hidden states, without ever holding all logits.

Invariant: values and gradients are exact and do not depend on the chunk size; logits are upcast to
float32 (or kept in float64) before temperature and log-sum-exp. The only place that turns hidden
states into probabilities; called by `learners.model`.
"""

# ruff: noqa: F722 (shapes in annotations)

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learners.nucleus import Nucleus

# Logits held at once, 4 MiB near the caches or 512 MiB; and rows, for each of which the head is
# read less often.
_CPU_CHUNK, _GPU_CHUNK, _LEAST_ROWS = 2**20, 2**27, 128
_ROUNDING = 1e-6  # nats; float32 makes up to 6e-8 of the 0 of a nucleus of one token


class TokenOutputs(NamedTuple):
    """What the policy says of each loss token, in nats. A tuple, so that FSDP2 sees the tensors.

    `nucleus_entropy` is the entropy of the distribution renormalised over its nucleus; exactly 0,
    with gradient 0, for a nucleus of one token or none; zeros without a graph where no nucleus was
    asked for.
    """

    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    nucleus_entropy: Float[Tensor, " N"]


def token_outputs(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    labels: Int[Tensor, " N"],
    temperature: Float[Tensor, " N"],
    nucleus: Nucleus | None = None,
    chunk_rows: int | None = None,
) -> TokenOutputs:
    """log p(label) and entropies of softmax(hidden @ head.T / temperature), per row.

    Gradients flow to `hidden` and `head` through all three; a result that no loss uses costs
    nothing in the backward pass. Memory is O(chunk_rows * V) beside the inputs.
    """
    if chunk_rows is None:
        budget = _CPU_CHUNK if hidden.device.type == "cpu" else _GPU_CHUNK
        chunk_rows = max(_LEAST_ROWS, budget // head.shape[0])
    return TokenOutputs(
        *_TokenOutputs.apply(hidden, head, labels, temperature, nucleus, chunk_rows)  # type: ignore[misc]
    )


def _logits(hidden: Tensor, head: Tensor, temperature: Tensor) -> Tensor:
    logits = hidden @ head.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.div_(temperature[:, None])


class _TokenOutputs(torch.autograd.Function):
    """Backward recomputes each chunk's logits z: dl/dz = 1_label - p, dH/dz = -p (log p + H), and
    the latter again for the nucleus with q = p / mass on the kept tokens, 0 elsewhere. Forward
    takes x = z - max, e = exp(x), s = sum e: log p = x - log s, H = log s - sum(e x) / s. Each pass
    over [rows, V] costs as much as a thin product, so there are as few as can be.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        temperature: Tensor,
        nucleus: Nucleus | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        entropy, largest, total = (torch.empty_like(logprobs) for _ in range(3))
        nucleus_entropy, log_mass = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        threshold = torch.zeros_like(logprobs)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            x = _logits(hidden[rows], head, temperature[rows])
            largest[rows] = x.amax(-1)
            e = x.sub_(largest[rows, None]).exp()
            total[rows] = e.sum(-1)
            log_total = total[rows].log()
            logprobs[rows] = x.gather(-1, labels[rows, None]).squeeze(-1) - log_total
            if nucleus is None:
                entropy[rows] = log_total - x.mul_(e).sum(-1) / total[rows]
                continue
            p = e.div_(total[rows, None])
            threshold[rows] = nucleus.thresholds(p)
            is_kept = p >= threshold[rows, None]
            terms = x.mul_(p)
            entropy[rows] = log_total - terms.sum(-1)
            log_mass[rows] = p.mul_(is_kept).sum(-1).log()
            inner = terms.mul_(is_kept).sum(-1) / log_mass[rows].exp()
            found = log_mass[rows] + log_total - inner  # no number where nothing is kept
            nucleus_entropy[rows] = torch.where(found > _ROUNDING, found, 0.0)
        ctx.save_for_backward(
            hidden, head, labels, temperature, largest, total, entropy,
            threshold, log_mass, nucleus_entropy,
        )  # fmt: skip
        ctx.chunk_rows = chunk_rows
        ctx.set_materialize_grads(False)
        if nucleus is None:
            ctx.mark_non_differentiable(nucleus_entropy)
        return logprobs, entropy, nucleus_entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_logprobs, of_entropy, of_nucleus = gradients
        hidden, head, labels, temperature, largest, total, entropy = ctx.saved_tensors[:7]
        threshold, log_mass, nucleus_entropy = ctx.saved_tensors[7:]
        of_hidden = torch.zeros_like(hidden)
        of_head = None
        if ctx.needs_input_grad[1]:  # not where LoRA leaves the head frozen
            of_head = torch.zeros_like(head, dtype=total.dtype)
        for start in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            x = _logits(hidden[rows], head, temperature[rows]).sub_(largest[rows, None])
            e = x.exp()
            # d loss / d z = 1_label a - p (a + b (log p + H) + [kept] c (log p + H' - log mass))
            log_total = total[rows].log()
            of_label = torch.zeros_like(log_total) if of_logprobs is None else of_logprobs[rows]
            weights = of_label[:, None]
            if of_entropy is not None:
                offset = (entropy[rows] - log_total)[:, None]
                weights = (x + offset).mul_(of_entropy[rows, None]).add_(weights)
            share = total[rows].reciprocal()  # p = e share
            if of_nucleus is not None:
                e, share = e.div_(total[rows, None]), torch.ones_like(share)
                scale = of_nucleus[rows] * log_mass[rows].neg().exp()
                scale = torch.where(nucleus_entropy[rows] > 0, scale, 0.0)[:, None]
                offset = nucleus_entropy[rows] - log_mass[rows].nan_to_num(neginf=0.0) - log_total
                kept = x.add_(offset[:, None]).mul_(e >= threshold[rows, None])
                weights = kept.mul_(scale).add_(weights)
            cooling = temperature[rows].to(total.dtype).reciprocal()
            weights = weights * -(share * cooling)[:, None]
            of_logits = e.mul_(weights)
            of_logits.scatter_add_(-1, labels[rows, None], (of_label * cooling)[:, None])
            of_logits = of_logits.to(hidden.dtype)
            of_hidden[rows] = of_logits @ head
            if of_head is None:
                continue
            if of_head.dtype == of_logits.dtype:
                of_head.addmm_(of_logits.T, hidden[rows])  # without a second [V, D]
            else:
                of_head += of_logits.T @ hidden[rows]
        of_weights = None if of_head is None else of_head.to(head.dtype)
        return of_hidden, of_weights, None, None, None, None
