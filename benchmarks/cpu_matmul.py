"""float32 products of a learner's sizes on one thread: by MKL, as torch does them, and by oneDNN.

Sizes are those of a layer of a small policy, forward and both gradients. Run with
`python -m benchmarks.cpu_matmul`, exit code 1 when oneDNN is the slower one.
"""

import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.show import Row, judged
from learners import cpu_matmul

NUM_TOKENS = 1536
LAYERS = ((256, 256), (256, 640), (640, 256), (1024, 256))  # outputs, inputs
NUM_ROUNDS, NUM_CALLS = 5, 20
AT_LEAST = 1.0


class Products(NamedTuple):
    """Of one linear layer: its outputs and the gradients of inputs and weights."""

    inputs: Tensor
    weights: Tensor
    gradient: Tensor

    def run(self) -> None:
        self.inputs @ self.weights.T
        self.gradient @ self.weights
        self.gradient.T @ self.inputs

    @property
    def num_flops(self) -> int:
        return 3 * 2 * len(self.inputs) * self.weights.numel()


def rate(layers: list[Products]) -> float:
    """FLOP/s over all layers, the median of some rounds."""
    seconds: list[float] = []
    for _ in range(NUM_ROUNDS + 1):
        started = time.perf_counter()
        for _ in range(NUM_CALLS):
            for layer in layers:
                layer.run()
        seconds.append(time.perf_counter() - started)
    return NUM_CALLS * sum(layer.num_flops for layer in layers) / median(seconds[1:])


def rows() -> Iterator[Row]:
    claim = "float32 products of a learner on a CPU, one thread: oneDNN against MKL"
    bound = f"at least {AT_LEAST:g}x"
    torch.set_num_threads(1)
    layers = [
        Products(torch.randn(NUM_TOKENS, k), torch.randn(n, k), torch.randn(NUM_TOKENS, n))
        for n, k in LAYERS
    ]
    by_mkl = rate(layers)
    if cpu_matmul.install() is None:
        yield Row(claim, "not measured", bound, "not shown here", "torch has no oneDNN here")
        return
    by_onednn = rate(layers)
    yield judged(
        claim,
        f"{by_onednn / by_mkl:.2f}x: {by_onednn / 1e9:.0f} against {by_mkl / 1e9:.0f} GFLOP/s",
        bound,
        by_onednn >= AT_LEAST * by_mkl,
    )


def main() -> int:
    found = list(rows())
    for row in found:
        print(f"{row.verdict}: {row.claim}: {row.measured} (bound: {row.bound})")
    return int(any(row.verdict == "falls short" for row in found))


if __name__ == "__main__":
    sys.exit(main())
