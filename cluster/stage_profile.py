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

import msgspec
import numpy as np

from cluster import config_file
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.run_dir import RunDir

MIN_STEPS = 4
NUM_GROUPS = 128  # whose lengths are kept
VLLM_MOST = 1024  # sequences that Hone lets one engine run at once


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
    drop_fraction: float  # of scored groups, uniform ones above all
    lengths: list[list[int]]  # sampled tokens of each trajectory of groups as they came
    world_size: int
    workers: int
    gpus_per_worker: int
    max_policy_age: int
    groups_per_step: int
    learner_efficiency: float = 1.0  # of linear speed, kept at each doubling of ranks
    max_running: int = VLLM_MOST  # sequences of one engine; less where its KV cache is smaller
    measured_step_s: float | None = None
    measured_age: float | None = None
    measured_learner_idle: float | None = None

    def __post_init__(self) -> None:
        durations = (self.iteration_s, self.sequence_s, self.learn_token_s, self.learn_group_s)
        latencies = (self.score_s, self.score_latency_s)
        if min(*durations, *latencies, self.sync_s, self.pause_s) < 0:
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
        if config.resources.layout == "colocated":
            raise ConfigError(
                f"{run_dir.name}: resources.layout must be split to be profiled: ranks and engines "
                "that share a GPU slow each other down"
            )
        rows = _steady(run_dir.read_metrics())
        if len(rows) < MIN_STEPS:
            raise ConfigError(
                f"{run_dir.name}: {len(rows)} of its later steps are away from an evaluation, and "
                f"a profile needs {MIN_STEPS} (run.steps, eval.every)"
            )
        lines = GroupLog(run_dir).read()
        windows = [_Window(row, lines, config) for row in rows]
        whole = [w for w in windows if w.num_dropped == 0]  # one wave of groups in `sync` mode
        iteration_s, sequence_s = _two_rates(
            [(w.iterations, w.tokens, w.rollout_s)
             for w in (whole if len(whole) >= MIN_STEPS else windows)]
        )  # fmt: skip
        num_groups = config.rollout.groups_per_step
        learn_group_s, learn_token_s = _two_rates(
            [(num_groups, row["learner/num_loss_tokens"], w.learn_s)
             for row, w in zip(rows, windows, strict=True)]
        )  # fmt: skip
        groups = [line.completion_tokens for window in windows for line in window.sampled]
        lengths = [[max(1, n) for n in group] for group in groups if group]
        return cls(
            source=f"{run_dir.name} ({len(rows)} steps, policy age up to "
            f"{config.rollout.max_policy_age})",
            iteration_s=iteration_s,
            sequence_s=sequence_s,
            score_s=sum(w.score_s for w in windows) / len(groups),
            score_latency_s=fmean(map(_latency_s, rows)),
            learn_group_s=learn_group_s,
            learn_token_s=learn_token_s,
            sync_s=fmean(row["sync/total_s"] for row in rows),
            pause_s=fmean(row["sync/pause_s"] for row in rows),
            drop_fraction=sum(w.num_dropped for w in windows) / len(groups),
            lengths=random.Random(0).sample(lengths, min(NUM_GROUPS, len(lengths))),
            world_size=config.learner.world_size,
            workers=config.rollout.workers,
            gpus_per_worker=config.rollout.tensor_parallel_size,
            max_policy_age=config.rollout.max_policy_age,
            groups_per_step=num_groups,
            measured_step_s=fmean(row["time/step_s"] for row in rows),
            measured_age=fmean(row["policy_age/mean"] for row in rows),
            measured_learner_idle=fmean(1 - row["learner/busy_fraction"] for row in rows),
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


class _Window:
    """What happened between the ends of two steps."""

    def __init__(self, row: dict[str, float], lines: Sequence[GroupLine], config: Config) -> None:
        version = int(row["policy_version"]) - 1  # that the engines held
        self.sampled = [g for g in lines if g.fate is Fate.SAMPLED and g.policy_version == version]
        ids = {line.group_id for line in self.sampled}
        self.num_dropped = sum(g.fate is Fate.DROPPED and g.group_id in ids for g in lines)
        window_s = _window_s(row)
        workers = config.rollout.workers
        self.rollout_s = window_s * row["rollout/busy_fraction"]
        self.score_s = window_s * row["score/busy_fraction"]
        self.learn_s = window_s * row["learner/busy_fraction"]
        if config.rollout.max_policy_age == 0:
            self.tokens = sum(sum(g.completion_tokens) for g in self.sampled) / workers
            longest = [max(g.completion_tokens, default=0) for g in self.sampled]
            self.iterations = float(max(longest, default=0))
        else:
            self.tokens = row["rollout/tokens_per_s"] * window_s / workers
            running = config.max_groups_in_flight * config.rollout.group_size / workers
            self.iterations = self.tokens / min(running, VLLM_MOST)


def _steady(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    evaluated = {row["step"] for row in rows if "eval/pass@1" in row}
    first = rows[-1]["step"] / 2 if rows else 0.0
    return [
        row
        for row in rows
        if row["step"] > max(1.0, first)
        and not {row["step"], row["step"] - 1} & evaluated
        and "rollout/tokens_per_s" in row
    ]


def _window_s(row: dict[str, float]) -> float:
    """Seconds of the row: waited / (1 - busy) of the stage that waited most."""
    waited = {key.removeprefix("time/wait_s/"): s for key, s in row.items() if "wait_s" in key}
    stage = max(waited, key=waited.__getitem__)
    return waited[stage] / (1.0 - row[f"{'learner' if stage == 'learn' else stage}/busy_fraction"])


def _latency_s(row: dict[str, float]) -> float:
    """Mean of the slowest signal; in a row without means, the slowest verdict."""
    means = [
        s for key, s in row.items() if key.startswith("reward/") and key.endswith("/latency_s")
    ]
    return max(means, default=row.get("reward/latency_max_s", 0.0))


def _two_rates(samples: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Least squares of `x * a + y * b = z`; where one would be negative, the other stands alone."""
    x, y, z = np.array(samples).T
    a, b = np.linalg.lstsq(np.stack([x, y], axis=1), z, rcond=None)[0]
    if a < 0:
        return 0.0, float(y @ z / (y @ y))
    if b < 0:
        return float(x @ z / (x @ x)), 0.0
    return float(a), float(b)
