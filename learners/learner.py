"""One rank of the learner: gradients as groups arrive, one optimizer step when all are in.

Invariant: a step equals the full-batch loss, however groups were split over calls, micro-batches
and ranks. Gradients start as groups arrive where the configured credit and losses allow it;
otherwise the packs wait for `optim_step`, and nothing but their tokens is held. The learner knows
no algorithm: those live in `learners.credit` and `learners.objectives`. Every public method is
collective: all ranks call it with the same arguments. A plain class; Ray lives in
`learners.rank`.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.types import StepResult, TrajectoryGroup
from learners import checkpoint, cpu_matmul, weight_source
from learners.batch import MicroBatch, Row
from learners.credit import ValueBased, build_credit, check_critic, is_per_token, whitening_of
from learners.critic import open_critic
from learners.guidance import annotate
from learners.lora import Lora
from learners.model import PolicyModel, attention_on, load_policy, shard
from learners.objectives import WeightedLosses
from learners.optimizer import ShardedAdamW, learning_rate
from learners.packing import PackingPlan, assign
from learners.process_group import device_of, meet
from learners.records import Example, ScoreRequest, WarmStartProgress
from learners.reference import Reference, open_reference
from learners.step_clock import StepClock
from learners.token_view import TokenViewer
from learners.update import PolicyUpdate, UpdateResult
from learners.warm_start import warm_start
from learners.weight_sender import WeightSender
from learners.weight_share import WeightShare
from learners.whitening import whiten


class Learner:
    """Policy, critic, optimizers and process group of one rank.

    In `store` the ranks meet; `num_threads` is for torch on this rank (1 where several processes
    share two cores). Runs on the GPU unless `resources.accelerator` is cpu or there is
    none.
    """

    def __init__(
        self,
        *,
        config: Config,
        policy_dir: Path,
        rank: int,
        world_size: int,
        num_threads: int,
        store: Store | None = None,
    ) -> None:
        torch.set_num_threads(num_threads)
        torch.manual_seed(config.run.seed + rank)
        self._config = config
        self._policy_dir = policy_dir
        self._rank = rank
        self._device = device_of(config.resources.accelerator, rank)
        self._dtype: torch.dtype = getattr(torch, config.policy.dtype)
        if self._device.type == "cpu" and cpu_matmul.is_faster(self._dtype):
            cpu_matmul.install()
        self._credit = build_credit(config.objective.credit)
        self._losses = WeightedLosses(config.objective)
        check_critic(config.critic, self._credit)
        if is_per_token(self._credit):
            self._losses.refuse_token_credit()
        meet(self._device, rank, world_size, store, config.learner.timeout_s)
        mesh = init_device_mesh(self._device.type, (world_size,))

        def load() -> PolicyModel:
            is_checkpointed = "activations" in config.learner.save_memory
            attention = attention_on(self._device, self._dtype)
            adapters = Lora.of(config)
            return load_policy(policy_dir, is_checkpointed, attention, adapters)

        def open_policy(part: str) -> PolicyModel:
            policy = load()
            shard(policy, mesh, self._dtype, part in config.learner.save_memory)
            return policy

        self._policy = open_policy("policy")
        self._optimizer = ShardedAdamW(self._policy, config.learner.weight_decay)
        self._reference = open_reference(
            config, self._policy, open_policy, (self._losses, self._credit)
        )
        self._critic = open_critic(config, load, mesh, self._device)
        self._num_frozen = 0 if config.critic is None else config.critic.pretrain_steps
        parts = self._policy, self._optimizer, self._losses
        max_grad_norm = config.learner.max_grad_norm
        self._update = PolicyUpdate(*parts, self._device, max_grad_norm, self._critic)
        self.sender = WeightSender(self._policy.causal_lm, self._dtype, self._device, rank == 0)
        self.share = WeightShare(self._policy.causal_lm, self._dtype, self._device)
        self.view = TokenViewer(
            self._policy, policy_dir, self._losses, self._credit, self._annotated, self._device
        )
        self.saver = checkpoint.Saver()
        self._pending: dict[int, list[MicroBatch]] = {}
        self._clock = StepClock()
        self.step = self.policy_version = 0

    @property
    def _is_streaming(self) -> bool:
        """Gradients can be taken as groups arrive: nothing must be known of the step first."""
        return (
            self._losses.common_denominator is not None
            and not self._losses.needs_survey
            and self._config.learner.minibatches == self._config.learner.epochs == 1
            and whitening_of(self._credit) == "none"
        )

    @property
    def _rate(self) -> float | None:
        """The policy's learning rate in the present step; None where only the critic learns."""
        settings = self._config.learner
        if self.policy_version < self._num_frozen:
            return None
        return learning_rate(
            self.policy_version - self._num_frozen,
            peak=settings.lr,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=self._config.run.steps - self._num_frozen,
        )

    def forward_backward(self, groups: Sequence[TrajectoryGroup], plan: PackingPlan) -> None:
        """Take in this rank's share of `plan`, `groups` hold at least that share; its gradients
        are added now or, when something must be known of the whole step first, in `optim_step`.
        """
        with self._clock.working():
            self._take_in(groups, plan)

    def _take_in(self, groups: Sequence[TrajectoryGroup], plan: PackingPlan) -> None:
        credited = {group.group_id: (group, self._credit.assign(group)) for group in groups}
        for minibatch, microbatch in zip(
            plan.minibatches, plan.microbatches[self._rank], strict=True
        ):
            rows = Row.chosen(microbatch, credited, self.policy_version)
            pack = self._annotated(MicroBatch.pack(rows, self._device))
            if self._losses.needs_sampled_context:
                pack = annotate(self._policy, rows, pack)
            if self._is_streaming:
                self._update.accumulate(pack, is_frozen=self._rate is None)
            else:
                self._pending.setdefault(minibatch, []).append(pack)

    def _annotated(self, pack: MicroBatch) -> MicroBatch:
        """`pack` with what the frozen reference and the critic say of it, credit finished."""
        if self._reference is not None:
            pack = self._reference.annotate(pack)
        if self._critic is not None and isinstance(self._credit, ValueBased):
            pack = self._credit.estimate(self._critic.annotate(pack))
        return pack

    def optim_step(self) -> StepResult:
        """One update per mini-batch and epoch, each normalised by its global counts; the same on
        every rank.

        A non-finite loss or gradient skips its update; when all are skipped, weights and
        `policy_version` stay. The metric `grad/skipped` is the share of skipped updates. A step
        that teaches the critic alone counts as a version, too, and has no metrics of the policy.
        """
        rate = self._rate
        with self._clock.working():
            results = [self._update.apply(rate)] if self._is_streaming else self._updates(rate)
        self.step += 1
        self.policy_version += any(result.is_step for result in results)
        busy_s, share = self._clock.end_step()
        num_tokens = sum(result.num_tokens for result in results)
        metrics = self._update.step_metrics(results) | ({} if rate is None else {"lr": rate})
        metrics["learner/num_loss_tokens"] /= self._config.learner.epochs
        metrics["learner/tokens_per_s"] = num_tokens / busy_s
        if share is not None:
            metrics["learner/compute_fraction"] = share
        return StepResult(step=self.step, policy_version=self.policy_version, metrics=metrics)

    def _updates(self, rate: float | None) -> list[UpdateResult]:
        """The updates of a step whose groups are all in."""
        order = sorted(self._pending)
        packs = [pack for minibatch in order for pack in self._pending[minibatch]]
        ends = list(itertools.accumulate(len(self._pending[minibatch]) for minibatch in order))
        num_epochs = self._config.learner.epochs
        self._pending = {}
        if (kind := whitening_of(self._credit)) != "none":
            packs = whiten(packs, kind)
        if rate is None or len(order) * num_epochs > 1:
            self._update.anchor(packs)
            if rate is not None and self._losses.needs_proximal:
                packs = self._update.with_proximal(packs)
        shares = [packs[start:end] for start, end in itertools.pairwise([0, *ends])]
        results: list[UpdateResult] = []
        for number, share in enumerate(shares * num_epochs):
            share = [replace(pack, is_later_update=number > 0) for pack in share]
            if rate is not None:
                self._update.survey(share)
            for pack in share:
                self._update.accumulate(pack, is_frozen=rate is None)
            results.append(self._update.apply(rate))
        return results

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
            logprobs = self._policy(MicroBatch.pack([rows[i] for i in part], self._device)).logprobs
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
        yield from warm_start(
            self._policy,
            examples,
            section,
            microbatch_tokens=self._config.learner.microbatch_tokens,
            max_grad_norm=self._config.learner.max_grad_norm,
            seed=self._config.run.seed,
            device=self._device,
            num_cores=int(self._config.resources.cpus or os.cpu_count() or 1),
        )
        if isinstance(self._reference, Reference):
            self._reference.copy_from(self._policy)
        if self._critic is not None:
            self._critic.copy_from(self._policy)

    def export_weights(self, path: Path) -> None:
        """Safetensors of the full weights in `policy.dtype`; rank 0 writes, then renames."""
        weight_source.write_safetensors(
            self._policy.causal_lm, path, self._dtype, is_writer=self._rank == 0
        )

    def save(self, directory: Path) -> None:
        """A checkpoint to go on from; groups that have no step yet are not part of it."""
        self.begin_save(directory)
        self.saver.finish()

    def begin_save(self, directory: Path) -> None:
        """Start such a checkpoint; training may go on at once, `saver` knows when it is written."""
        progress = checkpoint.Progress(self.step, self.policy_version)
        self.saver.begin(directory, self._parts(), self._losses.state(), progress)

    def load(self, directory: Path) -> None:
        """Go on from `save`; groups that had no step yet are dropped."""
        self._update.drop()
        self._pending = {}
        self._clock.reset()
        state = self._losses.state()
        progress = checkpoint.load(directory, self._parts(), state)
        self._losses.restore(state)
        self.step, self.policy_version = progress.step, progress.policy_version

    def _parts(self) -> dict[str, checkpoint.Part]:
        parts = {"model": checkpoint.Part(self._policy, self._optimizer.inner)}
        if isinstance(self._reference, Reference):
            parts["reference"] = checkpoint.Part(self._reference.module)
        if self._critic is not None:
            parts["critic"] = self._critic.part
        return parts

    def export_hf(self, directory: Path) -> None:
        """A Hugging Face directory of the current policy."""
        checkpoint.export_hf(directory, self._policy.causal_lm, self._policy_dir, self._dtype)

    def close(self) -> None:
        """Leave the process group; the learner cannot be used afterwards."""
        dist.destroy_process_group()
