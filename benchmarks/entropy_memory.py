"""Memory and time of log-prob plus SIREN, chunked, against a plain dense log-softmax.

Each way runs in a process of its own, so that its peak is its own; `extra` is the peak above the
inputs and their gradients. SIREN's cost has its survey of the batch in it, a second forward pass.
Times are CPU seconds of one thread, so that neighbours on the machine do not count. Run with
`python -m benchmarks.entropy_memory [NUM_TOKENS]`, exit code 1 when a bound is passed, or call
`measure` and `judge`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.show import Row, judged

VOCAB, HIDDEN = 49152, 576  # as SmolLM2-135M
WAYS = ("logprobs", "siren", "dense")
NUM_SEQUENCES = 8
TIMEOUT_S = 1200
MOST_MEMORY, MOST_TIME, MOST_GAP = 1 / 8, 2.0, 1e-4


class Cost(NamedTuple):
    extra_bytes: int
    seconds: float
    checksum: float  # of the gradients, the same for `logprobs` and `dense`


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


def judge(costs: Mapping[str, Cost], what: str) -> list[Row]:
    """What `measure` found for `what`, against its bounds."""
    logprobs, siren, dense = (costs[way] for way in WAYS)
    share = siren.extra_bytes / dense.extra_bytes
    slowdown = siren.seconds / logprobs.seconds
    gap = abs(logprobs.checksum / dense.checksum - 1)
    return [
        judged(
            f"extra memory of log-prob and SIREN against a dense log-softmax, {what}",
            f"1/{1 / max(share, 1e-9):.0f}", f"at most 1/{1 / MOST_MEMORY:.0f}",
            0 < share <= MOST_MEMORY,
        ),
        judged(
            f"time with SIREN, its survey included, against log-prob alone, {what}",
            f"{slowdown:.2f}x (dense {dense.seconds / logprobs.seconds:.2f}x)",
            f"at most {MOST_TIME:g}x", slowdown <= MOST_TIME,
        ),
        judged(
            "chunked and dense gradients have the same size", f"{gap:.1e} apart", f"{MOST_GAP:g}",
            gap <= MOST_GAP,
        ),
    ]  # fmt: skip


def report(costs: Mapping[str, Cost], what: str) -> int:
    """Print costs and verdicts; 1 when one falls short."""
    for name, cost in costs.items():
        print(f"{name:>9}: {cost.extra_bytes / 2**20:8.0f} MiB extra, {cost.seconds:6.1f} s")
    rows = judge(costs, what)
    for row in rows:
        print(f"{row.verdict}: {row.claim}: {row.measured} (bound: {row.bound})")
    return int(any(row.verdict == "falls short" for row in rows))


def _run(num_tokens: int, way: str) -> Cost:
    import torch
    from torch import Tensor

    from learners import cpu_matmul
    from learners.batch import MicroBatch, Row
    from learners.logprobs import TokenOutputs, token_outputs
    from learners.nucleus import Nucleus
    from learners.siren import Siren

    torch.set_num_threads(1)
    if cpu_matmul.is_faster(torch.float32):  # as in a learner
        cpu_matmul.install()
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
    _forget_peak()
    before = _peak_kib()
    started = time.process_time()
    {"logprobs": logprobs, "siren": siren, "dense": dense}[way]().backward()
    seconds = time.process_time() - started
    extra_bytes = (_peak_kib() - before) * 1024
    checksum = sum(grad.double().abs().sum().item() for grad in (hidden.grad, head.grad))
    return Cost(extra_bytes, seconds, checksum)


def _forget_peak() -> None:
    """The peak is what is held now: making the inputs, and imports, took more for a while."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_kib() -> int:
    """Of this program alone: `ru_maxrss` holds the peak of the process that became it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(_run(int(sys.argv[1]), sys.argv[2])))
    else:
        asked = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
        sys.exit(report(measure(asked), f"{asked} tokens x {VOCAB} words"))
