"""Memory and time of log-prob plus nucleus entropy, chunked against dense, forward and backward.

Each way runs in a process of its own, so that its peak is its own; `extra` is the peak above the
inputs and their gradients. Times are CPU seconds of one thread, so that neighbours on the machine
do not count. Run with `python -m benchmarks.entropy_memory [NUM_TOKENS]`, or call `measure`.
"""

import json
import subprocess
import sys
import time
from typing import NamedTuple

VOCAB, HIDDEN = 49152, 576  # as SmolLM2-135M
WAYS = ("logprobs", "chunked", "dense")
TIMEOUT_S = 1200


class Cost(NamedTuple):
    extra_bytes: int
    seconds: float
    checksum: float  # of the gradient, the same for chunked and dense


def measure(num_tokens: int) -> dict[str, Cost]:
    """Cost by way: `logprobs` chunked without the nucleus, `chunked` and `dense` with it."""
    costs: dict[str, Cost] = {}
    for way in WAYS:
        answer = subprocess.run(
            [sys.executable, "-m", "benchmarks.entropy_memory", str(num_tokens), way],
            capture_output=True, text=True, check=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        costs[way] = Cost(*json.loads(answer.stdout))
    return costs


def _run(num_tokens: int, way: str) -> Cost:
    import resource

    import torch
    from torch import Tensor

    from learners.logprobs import token_outputs
    from learners.nucleus import Nucleus

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator) / HIDDEN**0.5
    sharpness = torch.empty(num_tokens, 1).uniform_(2, 8, generator=generator)
    hidden = (hidden * sharpness).requires_grad_()  # logits of std 2 to 8: flat and peaked rows
    head = torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (num_tokens,), generator=generator)

    def dense() -> Tensor:
        log_p = (hidden @ head.T).log_softmax(-1)
        ordered, order = log_p.exp().sort(descending=True)
        kept = torch.zeros_like(ordered).scatter(
            -1, order, ((ordered.cumsum(-1) - ordered) < 0.8).float()
        )
        q = log_p.exp() * kept
        q = q / q.sum(-1, keepdim=True)
        entropy = -(q * q.clamp(min=1e-30).log()).sum(-1)
        return log_p.gather(-1, labels[:, None]).sum() + entropy.sum()

    def chunked() -> Tensor:
        nucleus = Nucleus(0.8) if way == "chunked" else None
        outputs = token_outputs(hidden, head, labels, torch.ones(num_tokens), nucleus)
        return outputs.logprobs.sum() + (outputs.nucleus_entropy.sum() if nucleus else 0)

    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    (dense() if way == "dense" else chunked()).backward()
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost((peak - before) * 1024, seconds, hidden.grad.double().abs().sum().item())


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(_run(int(sys.argv[1]), sys.argv[2])))
    else:
        for name, cost in measure(int(sys.argv[1]) if len(sys.argv) > 1 else 8192).items():
            print(f"{name:>9}: {cost.extra_bytes / 2**20:8.0f} MiB extra, {cost.seconds:6.1f} s")
