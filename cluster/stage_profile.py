"""How long the stages of a run take, measured from the files it left.

Invariant: every number is a fit or a mean over the later half of the run's steps, without the
first and without those beside an evaluation, which shares the engines. Read by
`cluster.simulation`.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from cluster import config_file
from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from cluster.stage_windows import windows_of

MIN_STEPS = 4
NUM_GROUPS = 128  # whose lengths are kept
VLLM_MOST = 1024  # sequences that Hone lets one engine run at once


class Pace(msgspec.Struct, frozen=True, array_like=True):
    """One step's times over what the profile expects of them: 1.2 is a fifth slower."""

    learn: float = 1.0
    sync: float = 1.0


class StageProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds on the devices of `source`.

    Example: `iteration_s` 0.01 and `sequence_s` 0.0001 are 100 tokens/s for one sequence, 5,000
    for a hundred. `learn_token_s` counts sampled tokens, and `learn_group_s` what else a group
    costs (prompts, its share of the optimizer), with `world_size` ranks.
    """

    source: str
    iteration_s: float  # of one decoding iteration, however few sequences run
    sequence_s: float  # added by each of them
    score_s: float  # by which a group keeps the reward workers from the next
    score_latency_s: float  # from its end to its verdicts
    learn_group_s: float  # of a group, however long
    learn_token_s: float
    sync_s: float  # from the step to engines that hold it
    pause_s: float  # of which engines stand still
    hold_s: float | None = None  # and the learner, unless in `sync` mode; None: all the time
    drop_fraction: float  # of scored groups, uniform ones above all
    lengths: list[list[int]]  # sampled tokens of each trajectory of groups as they came
    world_size: int
    workers: int
    gpus_per_worker: int
    max_policy_age: int
    groups_per_step: int
    paces: tuple[Pace, ...] = (Pace(),)  # of the steps as they came: a machine is not steady
    learner_efficiency: float = 1.0  # of linear speed, kept at each doubling of ranks
    max_running: int = VLLM_MOST  # sequences of one engine; less where its KV cache is smaller
    measured_step_s: float | None = None
    measured_age: float | None = None
    measured_learner_idle: float | None = None

    def __post_init__(self) -> None:
        durations = (self.iteration_s, self.sequence_s, self.learn_token_s, self.learn_group_s)
        latencies = (self.score_s, self.score_latency_s)
        if min(*durations, *latencies, self.sync_s, self.pause_s, self.hold_s or 0.0) < 0:
            raise ValueError("durations must be at least 0")
        if self.iteration_s + self.sequence_s <= 0:
            raise ValueError("iteration_s + sequence_s must be above 0")
        if not 0 <= self.drop_fraction < 1:
            raise ValueError(f"drop_fraction must be in [0, 1), got {self.drop_fraction:g}")
        if not 0.5 < self.learner_efficiency <= 1:
            raise ValueError(
                "learner_efficiency must be above 0.5, where ranks add nothing, and "
                f"at most 1, got {self.learner_efficiency:g}"
            )
        if not self.paces or min(min(p.learn, p.sync) for p in self.paces) < 0:
            raise ValueError("paces must have a step, and none below 0")
        if not self.lengths or not all(lengths and min(lengths) > 0 for lengths in self.lengths):
            raise ValueError("lengths must have groups of at least one token a trajectory")
        if min(self.world_size, self.workers, self.gpus_per_worker, self.groups_per_step) < 1:
            raise ValueError("world_size, workers, gpus_per_worker, groups_per_step: at least 1")

    @classmethod
    def read(cls, path: Path) -> "StageProfile":
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"--profile {path}: must be a stage profile: {error}") from error

    @classmethod
    def of_run(cls, run_dir: RunDir) -> "StageProfile":
        """Of a run that has taken steps enough; raises `ConfigError` for one that has not."""
        config = config_file.load(run_dir.config)
        if config.resources.layout != "split":
            raise ConfigError(
                f"{run_dir.name}: resources.layout must be split to be profiled: ranks and engines "
                "that share a GPU slow each other down"
            )
        windows = windows_of(run_dir, config, VLLM_MOST)
        if len(windows) < MIN_STEPS:
            raise ConfigError(
                f"{run_dir.name}: {len(windows)} of its later steps are away from an evaluation, "
                f"and a profile needs {MIN_STEPS} (run.steps, eval.every)"
            )
        rollout = _Rates([wave for w in windows for wave in w.waves])
        learn = _Rates([(w.num_groups, w.loss_tokens, w.learn_s) for w in windows])
        sync_s = fmean(w.sync_s for w in windows)
        paces = [
            Pace(
                w.learn_s / learn.expect(w.num_groups, w.loss_tokens),
                w.sync_s / sync_s,
            )
            for w in windows
        ]
        groups = [line.completion_tokens for window in windows for line in window.sampled]
        lengths = [[max(1, n) for n in group] for group in groups if group]
        return cls(
            source=f"{run_dir.name} ({len(windows)} steps, policy age up to "
            f"{config.rollout.max_policy_age})",
            iteration_s=rollout.first,
            sequence_s=rollout.second,
            score_s=sum(w.score_s for w in windows) / len(groups),
            score_latency_s=fmean(w.score_latency_s for w in windows),
            learn_group_s=learn.first,
            learn_token_s=learn.second,
            sync_s=sync_s,
            pause_s=fmean(w.row["sync/pause_s"] for w in windows),
            hold_s=fmean(w.row.get("sync/hold_s", w.sync_s) for w in windows),
            drop_fraction=sum(w.num_dropped for w in windows) / len(groups),
            lengths=random.Random(0).sample(lengths, min(NUM_GROUPS, len(lengths))),
            world_size=config.learner.world_size,
            workers=config.rollout.workers,
            gpus_per_worker=config.rollout.tensor_parallel_size,
            max_policy_age=config.rollout.max_policy_age,
            groups_per_step=config.rollout.groups_per_step,
            paces=tuple(paces),
            measured_step_s=fmean(w.row["time/step_s"] for w in windows),
            measured_age=fmean(w.row["policy_age/mean"] for w in windows),
            measured_learner_idle=fmean(1 - w.row["learner/busy_fraction"] for w in windows),
        )

    def learn_s(self, num_groups: int, num_tokens: int, world_size: int) -> float:
        """Seconds of `world_size` ranks for these groups."""
        kept = self.learner_efficiency ** math.log2(world_size / self.world_size)
        work_s = self.learn_group_s * num_groups + self.learn_token_s * num_tokens
        return work_s * self.world_size / world_size / kept

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self) + b"\n")

    def with_model(self, scale: float) -> "StageProfile":
        """As if all work on tokens and weights took `scale` times as long."""
        return msgspec.structs.replace(
            self,
            source=f"{self.source}, model x {scale:g}",
            iteration_s=self.iteration_s * scale,
            sequence_s=self.sequence_s * scale,
            learn_token_s=self.learn_token_s * scale,
            learn_group_s=self.learn_group_s * scale,
            sync_s=self.sync_s * scale,
            pause_s=self.pause_s * scale,
            hold_s=None if self.hold_s is None else self.hold_s * scale,
        )

    def with_lengths(self, mean: float, sigma: float, cap: int) -> "StageProfile":
        """Log-normal lengths, `mean` before the cut at `cap`, `sigma` of the logarithm (1 is a
        heavy tail); the trajectories of a group are drawn independently.
        """
        rng, group_size = random.Random(0), len(self.lengths[0])
        mu = math.log(mean) - sigma**2 / 2
        lengths = [
            [min(cap, max(1, round(rng.lognormvariate(mu, sigma)))) for _ in range(group_size)]
            for _ in range(NUM_GROUPS)
        ]
        source = f"{self.source}, lengths log-normal({mean:g}, {sigma:g}) up to {cap}"
        return msgspec.structs.replace(self, source=source, lengths=lengths)


class _Rates:
    """Least squares of `x * first + y * second = z` over samples (x, y, z), neither rate below 0:
    where one would be, the other stands alone.
    """

    def __init__(self, samples: Sequence[tuple[float, float, float]]) -> None:
        x, y, z = np.array(samples, dtype=np.float64).T
        linalg: Any = np.linalg  # its stubs leave the result unknown
        solution = linalg.lstsq(np.stack([x, y], axis=1), z, rcond=None)[0]
        self.first, self.second = float(solution[0]), float(solution[1])
        if self.first < 0:
            self.first, self.second = 0.0, float(y @ z / (y @ y))
        elif self.second < 0:
            self.first, self.second = float(x @ z / (x @ x)), 0.0

    def expect(self, x: float, y: float) -> float:
        return x * self.first + y * self.second
