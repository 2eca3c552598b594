"""One rank of the learner: gradients as groups arrive, one optimizer step when all are in.

Invariant: gradients accumulate unnormalised sums and are divided by global counts once, in
`optim_step`; so a step equals the full-batch loss, however groups were split over calls,
micro-batches and ranks. Every public method is collective: all ranks call it with the same
arguments. A plain class; Ray lives in `learners.group`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.types import StepResult, TrajectoryGroup
from learners import checkpoint, weight_source
from learners.batch import MicroBatch, Row
from learners.credit import build_credit
from learners.model import load_policy, shard
from learners.objectives import WeightedLosses
from learners.optimizer import ShardedAdamW, clip_factor, learning_rate
from learners.packing import PackingPlan, assign
from learners.step_sums import StepSums
from learners.warm_start import Example, WarmStartProgress, warm_start

_COUNTS = ("grad_square", "num_loss_tokens", "num_sequences", "num_tokens", "busy_s")


@dataclass(frozen=True)
class ScoreRequest:
    """`token_ids` [C + L], of which the first `num_context` = C >= 1 are given."""

    token_ids: Sequence[int]
    num_context: int


class Learner:
    """Policy, optimizer and process group of one rank.

    `master` is "host:port" of rank 0; `num_threads` is for torch on this rank (1 where several
    processes share two cores). Runs on the GPU unless `resources.accelerator` is cpu or there is
    none.
    """

    def __init__(
        self,
        *,
        config: Config,
        policy_dir: Path,
        rank: int,
        world_size: int,
        master: str,
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        torch.manual_seed(config.run.seed + rank)
        self._config = config
        self._policy_dir = policy_dir
        self._rank, self._world_size = rank, world_size
        self._device = _device(config.resources.accelerator, rank)
        self._dtype: torch.dtype = getattr(torch, config.policy.dtype)
        self._credit = build_credit(config.objective.credit)
        self._losses = WeightedLosses(config.objective)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo",
            init_method=f"tcp://{master}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=config.learner.timeout_s),
        )
        self._policy = load_policy(
            policy_dir, self._device, config.learner.activation_checkpointing
        )
        shard(self._policy, init_device_mesh(self._device.type, (world_size,)), self._dtype)
        self._optimizer = ShardedAdamW(self._policy, config.learner.weight_decay)
        self._sums = StepSums(self._device)
        self._busy_s = 0.0
        self.step = 0
        self.policy_version = 0

    def forward_backward(self, groups: Sequence[TrajectoryGroup], plan: PackingPlan) -> None:
        """Add the gradients of this rank's share of `plan`; `groups` hold at least that share."""
        started = time.perf_counter()
        credited = {group.group_id: (group, self._credit.assign(group)) for group in groups}
        for microbatch in plan.microbatches[self._rank]:
            rows: list[Row] = []
            for ref in microbatch:
                group, advantages = credited[ref.group_id]
                trajectory, credit = group.trajectories[ref.index], advantages[ref.index]
                if credit is not None and trajectory.num_loss_tokens > 0:
                    rows.append(Row.of(trajectory, credit))
            self._accumulate(MicroBatch.pack(rows, self._device))
        self._busy_s += time.perf_counter() - started

    def _accumulate(self, rows: MicroBatch) -> None:
        learner_logprobs, entropy = self._policy(rows)
        total, sums = self._losses.sums(rows, learner_logprobs, entropy)
        total.backward()
        self._sums.add(sums)
        self._sums.add(
            {
                "num_loss_tokens": rows.num_loss_tokens,
                "num_sequences": rows.num_sequences,
                "num_tokens": rows.num_tokens,
            }
        )

    def optim_step(self) -> StepResult:
        """Normalise by the global counts, clip, step; the same result on every rank.

        A non-finite loss or gradient skips the step: weights and `policy_version` stay, and the
        metric `grad/skipped` is 1. So does a step without a loss token.
        """
        started = time.perf_counter()
        settings = self._config.learner
        self._sums.add({"grad_square": self._optimizer.grad_square(), "busy_s": self._busy_s})
        totals = self._sums.reduce()
        num_loss_tokens = totals["num_loss_tokens"]
        kind = self._losses.denominator
        denominator = max(1.0, num_loss_tokens if kind == "tokens" else totals["num_sequences"])
        scale = self._world_size / denominator  # FSDP2 has averaged the ranks' sums
        grad_norm = math.sqrt(totals["grad_square"]) * scale
        is_sound = math.isfinite(grad_norm) and math.isfinite(totals["loss/total"])
        is_step = is_sound and num_loss_tokens > 0
        rate = learning_rate(
            self.policy_version,
            peak=settings.lr,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=self._config.run.steps,
        )
        if is_step:
            self._optimizer.step(rate, scale * clip_factor(grad_norm, settings.max_grad_norm))
        else:
            self._optimizer.skip()
        self.step += 1
        self.policy_version += is_step
        busy_s = totals["busy_s"] / self._world_size + time.perf_counter() - started
        self._busy_s = 0.0
        metrics = {
            name: value / (denominator if name.startswith("loss/") else max(1.0, num_loss_tokens))
            for name, value in totals.items()
            if name not in _COUNTS
        }
        metrics |= {
            "grad/norm": grad_norm,
            "grad/skipped": float(not is_step),
            "lr": rate,
            "learner/num_loss_tokens": num_loss_tokens,
            "learner/tokens_per_s": totals["num_tokens"] / busy_s,
        }
        return StepResult(step=self.step, policy_version=self.policy_version, metrics=metrics)

    @torch.no_grad()
    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Log-probs float32 [L] of each request's tokens after its context, at temperature 1.

        Every rank computes all of them.
        """
        rows = [
            Row.plain(
                np.asarray(request.token_ids[: request.num_context], dtype=np.int32),
                np.asarray(request.token_ids[request.num_context :], dtype=np.int32),
            )
            for request in requests
        ]
        lengths = [len(request.token_ids) for request in requests]
        scores = [np.zeros(0, dtype=np.float32)] * len(rows)
        for part in assign(lengths, 1, self._config.learner.microbatch_tokens)[0]:
            logprobs, _ = self._policy(MicroBatch.pack([rows[i] for i in part], self._device))
            ends = np.cumsum([len(rows[i].completion) for i in part])
            values = np.split(logprobs.float().cpu().numpy(), ends[:-1])
            for index, value in zip(part, values, strict=True):
                scores[index] = value
        # Without a backward pass the root stays gathered, and would miss the next optimizer step.
        cast(FSDPModule, self._policy).reshard()
        return scores

    def warm_start(self, examples: Sequence[Example]) -> Iterator[WarmStartProgress]:
        """Supervised steps per `warm_start` of the config, one per item; the version stays 0."""
        section = self._config.warm_start
        if section is None:
            raise ConfigError("warm_start: the config must have this section to warm-start")
        return warm_start(
            self._policy,
            examples,
            section,
            microbatch_tokens=self._config.learner.microbatch_tokens,
            max_grad_norm=self._config.learner.max_grad_norm,
            seed=self._config.run.seed,
            device=self._device,
        )

    def export_weights(self, path: Path) -> None:
        """Safetensors of the full weights in `policy.dtype`; rank 0 writes, then renames."""
        weight_source.write_safetensors(
            self._policy.causal_lm, path, self._dtype, is_writer=self._rank == 0
        )

    def save(self, directory: Path) -> None:
        """A checkpoint to go on from; groups that have no step yet are not part of it."""
        progress = checkpoint.Progress(self.step, self.policy_version)
        checkpoint.save(directory, self._policy, self._optimizer.inner, progress)

    def load(self, directory: Path) -> None:
        """Go on from `save`; gradients that had no step yet are dropped."""
        self._optimizer.skip()
        self._sums, self._busy_s = StepSums(self._device), 0.0
        progress = checkpoint.load(directory, self._policy, self._optimizer.inner)
        self.step, self.policy_version = progress.step, progress.policy_version

    def export_hf(self, directory: Path) -> None:
        """A Hugging Face directory of the current policy."""
        checkpoint.export_hf(directory, self._policy.causal_lm, self._policy_dir, self._dtype)

    def close(self) -> None:
        """Leave the process group; the learner cannot be used afterwards."""
        dist.destroy_process_group()


def _device(accelerator: str, rank: int) -> torch.device:
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("resources.accelerator is gpu, but this process sees no CUDA device")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
