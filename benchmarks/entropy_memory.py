"""Memory and time of log-prob plus SIREN, chunked, against a plain dense log-softmax.

Each way runs in a process of its own, so that its peak is its own; `extra` is the peak above the
inputs and their gradients. SIREN's cost has its survey of the batch in it, a second forward pass.
Times are CPU seconds of one thread, so that neighbours on the machine do not count. Run with
`python -m benchmarks.entropy_memory [NUM_TOKENS]`, or call `measure`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

VOCAB, HIDDEN = 49152, 576  # as SmolLM2-135M
WAYS = ("logprobs", "siren", "dense")
NUM_SEQUENCES = 8
TIMEOUT_S = 1200


class Cost(NamedTuple):
    extra_bytes: int
    seconds: float
    checksum: float  # of the gradient, the same for `logprobs` and `dense`


def measure(num_tokens: int) -> dict[str, Cost]:
    """Cost by way: log-probs chunked, the same with SIREN, log-probs by a dense log-softmax."""
    costs: dict[str, Cost] = {}
    for way in WAYS:
        answer = subprocess.run(
            [sys.executable, "-m", "benchmarks.entropy_memory", str(num_tokens), way],
            capture_output=True, text=True, check=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        costs[way] = Cost(*json.loads(answer.stdout))
    return costs


def _run(num_tokens: int, way: str) -> Cost:

    import torch
    from torch import Tensor

    from learners.batch import MicroBatch, Row
    from learners.logprobs import TokenOutputs, token_outputs
    from learners.nucleus import Nucleus
    from learners.siren import Siren

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator) / HIDDEN**0.5
    sharpness = torch.empty(num_tokens, 1).uniform_(2, 8, generator=generator)
    hidden = (hidden * sharpness).requires_grad_()  # logits of std 2 to 8: flat and peaked rows
    head = torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (num_tokens,), generator=generator)

    def outputs(nucleus: Nucleus | None = None) -> TokenOutputs:
        return token_outputs(hidden, head, labels, torch.ones(num_tokens), nucleus)

    def logprobs() -> Tensor:
        return outputs().logprobs.sum()

    def siren() -> Tensor:
        completions = labels.to(torch.int32).numpy().reshape(NUM_SEQUENCES, -1)
        rows = MicroBatch.pack([Row.plain(row[:1], row) for row in completions])
        objective = Siren(anchor=0.5)
        with torch.no_grad():
            objective.begin(objective.survey(rows, outputs(objective.nucleus)))
        found = outputs(objective.nucleus)
        return found.logprobs.sum() + objective.loss(rows, found).total

    def dense() -> Tensor:
        return (hidden @ head.T).log_softmax(-1).gather(-1, labels[:, None]).sum()

    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    before = _peak_kib()
    started = time.process_time()
    {"logprobs": logprobs, "siren": siren, "dense": dense}[way]().backward()
    seconds = time.process_time() - started
    return Cost((_peak_kib() - before) * 1024, seconds, hidden.grad.double().abs().sum().item())


def _peak_kib() -> int:
    """Of this program alone: `ru_maxrss` holds the peak of the process that became it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(_run(int(sys.argv[1]), sys.argv[2])))
    else:
        for name, cost in measure(int(sys.argv[1]) if len(sys.argv) > 1 else 8192).items():
            print(f"{name:>9}: {cost.extra_bytes / 2**20:8.0f} MiB extra, {cost.seconds:6.1f} s")
