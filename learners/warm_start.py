"""Supervised warm start: fit worked solutions before RL begins.

Invariant: the loss is the mean over completion tokens of the whole batch, whatever the packing and
the number of ranks; every rank draws the same batches. Called by the learner, whose RL optimizer
starts fresh afterwards.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from cluster.config import WarmStartSection
from cluster.errors import ConfigError, StageError
from learners.batch import MicroBatch, Row
from learners.model import PolicyModel
from learners.optimizer import ShardedAdamW, clip_factor, learning_rate
from learners.packing import assign
from learners.records import Example, WarmStartProgress
from learners.step_sums import StepSums

_WARMUP_FRACTION = 0.05


def warm_start(
    policy: PolicyModel,
    examples: Sequence[Example],
    section: WarmStartSection,
    *,
    microbatch_tokens: int,
    max_grad_norm: float,
    seed: int,
    device: torch.device,
    num_cores: int = 1,
) -> Iterator[WarmStartProgress]:
    """Train step by step; the rate follows a cosine from `section.lr` to a tenth of it.

    On CPU the ranks share `num_cores` math threads: engines have nothing to do yet.
    """
    rows = [
        Row.plain(np.asarray(context, dtype=np.int32), np.asarray(completion, dtype=np.int32))
        for context, completion in examples
    ]
    if not rows:
        raise ConfigError(
            "warm_start: tasks.train must have a solution or a reference to learn from"
        )
    optimizer = ShardedAdamW(policy, weight_decay=0.0)
    sums = StepSums(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, num_cores // world_size))
    for step, batch in enumerate(_batches(len(rows), section, seed)):
        lengths = [len(rows[i].context) + len(rows[i].completion) for i in batch]
        for part in assign(lengths, world_size, microbatch_tokens)[rank]:
            pack = MicroBatch.pack([rows[batch[i]] for i in part], device)
            total = -policy(pack).logprobs.sum()
            total.backward()
            sums.add({"loss": total.detach(), "tokens": pack.num_loss_tokens})
        sums.add({"grad_square": optimizer.grad_square()})
        totals = sums.reduce().sums
        scale = world_size / totals["tokens"]
        grad_norm = math.sqrt(totals["grad_square"]) * scale
        if not math.isfinite(grad_norm):
            raise StageError(
                "warm_start", f"gradient norm must be finite, got {grad_norm} (warm_start.lr)"
            )
        rate = learning_rate(
            step,
            peak=section.lr,
            schedule="cosine",
            warmup_steps=int(section.steps * _WARMUP_FRACTION),
            total_steps=section.steps,
        )
        optimizer.step(rate, scale * clip_factor(grad_norm, max_grad_norm))
        yield WarmStartProgress(step + 1, section.steps, totals["loss"] / totals["tokens"])
    torch.set_num_threads(before)


def _batches(num_rows: int, section: WarmStartSection, seed: int) -> Iterator[list[int]]:
    """Batches of indices; each pass over the examples has its own order."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(section.steps):
        while len(queue) < section.batch_size:
            queue.extend(rng.permutation(num_rows).tolist())
        yield queue[: section.batch_size]
        del queue[: section.batch_size]
