"""float32 products of a learner's sizes on one thread: by MKL, as torch does them, and by oneDNN.

Sizes are those of a layer of a small policy, forward and both gradients. Run with
`python -m benchmarks.cpu_matmul`, exit code 1 when oneDNN is the slower one where a learner takes
it. Measured in a process of its own: the products of the one that asks stay as they are.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

from benchmarks.show import Row, judged

NUM_TOKENS = 1536
LAYERS = ((256, 256), (256, 640), (640, 256), (1024, 256))  # outputs, inputs
NUM_ROUNDS, NUM_CALLS = 5, 20
AT_LEAST = 1.0
TIMEOUT_S = 300


def measure() -> list[float]:
    """FLOP/s by MKL and by oneDNN, each the median of some rounds; none where a learner stays with
    MKL.
    """
    import torch

    from learners import cpu_matmul

    torch.set_num_threads(1)
    layers = [
        (torch.randn(NUM_TOKENS, k), torch.randn(n, k), torch.randn(NUM_TOKENS, n))
        for n, k in LAYERS
    ]
    num_flops = sum(3 * 2 * len(inputs) * weights.numel() for inputs, weights, _ in layers)

    def rate() -> float:
        seconds: list[float] = []
        for _ in range(NUM_ROUNDS + 1):
            started = time.perf_counter()
            for _ in range(NUM_CALLS):
                for inputs, weights, gradient in layers:
                    torch.mm(inputs, weights.T)
                    torch.mm(gradient, weights)
                    torch.mm(gradient.T, inputs)
            seconds.append(time.perf_counter() - started)
        return NUM_CALLS * num_flops / median(seconds[1:])

    if not cpu_matmul.is_faster(torch.float32):
        return []
    by_mkl = rate()
    return [] if cpu_matmul.install() is None else [by_mkl, rate()]


def rows() -> Iterator[Row]:
    claim = "float32 products of a learner on a CPU, one thread: oneDNN against MKL"
    bound = f"at least {AT_LEAST:g}x"
    command = [sys.executable, "-m", "benchmarks.cpu_matmul", "measure"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    if rates := json.loads(answer.stdout):
        by_mkl, by_onednn = rates
        yield judged(
            claim,
            f"{by_onednn / by_mkl:.2f}x: {by_onednn / 1e9:.0f} against {by_mkl / 1e9:.0f} GFLOP/s",
            bound,
            by_onednn >= AT_LEAST * by_mkl,
        )
    else:
        yield Row(claim, "-", bound, "not shown here", "on this CPU a learner stays with MKL")


def main() -> int:
    found = list(rows())
    for row in found:
        print(f"{row.verdict}: {row.claim}: {row.measured} (bound: {row.bound})")
    return int(any(row.verdict == "falls short" for row in found))


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(json.dumps(measure()))
    else:
        sys.exit(main())
