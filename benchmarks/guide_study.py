"""Guide in kind: a policy that can follow hints learns to do without them what GRPO never finds.

Tasks are messages in a secret code (`benchmarks.secret_code`). The policy starts from a warm start
on codes drawn anew each time, so it can follow a hint, not quite reliably, and can only guess where
there is none. Nothing ever shows it the secret code but the hints of tasks whose plain rollouts all
failed. Held-out messages are never trained on and never hinted.

    python -m benchmarks.guide_study FOLDER [SEED ...]

runs every arm with every seed, prints a table and writes `guide_study.svg`;
`benchmarks.show_learner` has a row of it.
"""

import copy
import importlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.proofs import ROOT, run_timed
from benchmarks.secret_code import EVAL_TASKS, LENGTH, TEMPLATE, warm_examples, write_tasks
from benchmarks.show import Row, judged
from cluster import config_file
from cluster.errors import StageError
from cluster.run_dir import RunDir
from cluster.types import Message
from learners.learner import Learner
from learners.policy_dir import prepare
from learners.tokenizer import encode_completion, load_tokenizer, render

HONE = Path(sys.executable).parent / "hone"
WARM_EXAMPLES = 20_000
STEPS = 80
RUN_TIMEOUT_S = 900.0
MOST_PLAIN, LEAST_GUIDED = 0.02, 0.30  # pass@1
CONFIG: dict[str, Any] = {
    "run": {"steps": STEPS, "checkpoint_every": STEPS, "trackers": []},
    "rollout": {
        "group_size": 8,
        "groups_per_step": 12,
        "max_new_tokens": LENGTH + 1,
        "max_policy_age": 0,
        "kv_cache_gib": 0.25,
    },
    "rewards": {"verifiers": {"correct": {"use": "benchmarks.secret_code:Exact"}}},
    "learner": {"lr": 1e-3, "microbatch_tokens": 2048},
    "eval": {"every": 10, "tasks": EVAL_TASKS, "samples_per_task": 2},
    "resources": {"accelerator": "cpu"},
    "tasks": {"skip_uniform": False},
}
POLICY = {"type": "tiny", "hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_length": 64}
GUIDE = {"use": "guide", "settings": {"template": TEMPLATE, "reject": ""}}
PLAIN = "GRPO"
# Guide's factors apart: the policy step is clipped as in PPO, which matters with several updates.
APART = {"use": "guide", "settings": {"factors": "apart", "shaping": "truncate"}}
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "Guide-GRPO": {
        "rollout": {"program": GUIDE},
        "objective": {"losses": {"policy": {"use": "guide"}}},
    },
    "Guide, PPO clip": {
        "rollout": {"program": GUIDE},
        "learner": {"minibatches": 2},
        "objective": {"losses": {"policy": APART}},
    },
}
WARM_UP = {"examples": WARM_EXAMPLES, "steps": 400, "batch_size": 64, "lr": 2e-3}


@dataclass(frozen=True)
class Curve:
    """One run: (step, held-out unhinted pass@1), and the share of groups that were hinted."""

    pass_at_1: list[tuple[int, float]]
    guided: list[tuple[int, float]]

    @property
    def last(self) -> float:
        return self.pass_at_1[-1][1]


def warm_policy(folder: Path, seed: int) -> Path:
    """A directory with the policy after its warm start."""
    tiny = {"policy": POLICY, "warm_start": WARM_UP, "run": {"seed": seed}}
    tasks = {"train": {"use": "file", "settings": {"path": str(folder / "train.jsonl")}}}
    config = config_file.parse({**CONFIG, **tiny, "tasks": tasks}, "guide study")
    examples = warm_examples(WARM_EXAMPLES, seed)
    texts = [text for pair in examples[:500] for text in pair]
    policy_dir = prepare(config.policy, texts, folder / "cache", folder / "tiny", seed)
    tokenizer = load_tokenizer(policy_dir)
    encoded = [
        (
            render(tokenizer, [Message(role="user", content=prompt)]),
            encode_completion(tokenizer, answer),
        )
        for prompt, answer in examples
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learner = Learner(
        config=config,
        policy_dir=policy_dir,
        rank=0,
        world_size=1,
        master=f"127.0.0.1:{port}",
        num_threads=os.cpu_count() or 1,
    )
    for progress in learner.warm_start(encoded):
        if progress.step % 250 == 0:
            print(f"  warm start {progress.step}: loss {progress.loss:.3f}", flush=True)
    learner.export_hf(folder / "warm")
    learner.close()
    return folder / "warm"


def run_arm(folder: Path, policy: Path, arm: str, seed: int) -> Curve:
    """Train one arm in `folder` through the `hone` command."""
    name = re.sub(r"\W+", "_", arm)
    if not (folder / "runs" / name / "report.html").exists():
        config = config_of(folder, policy, arm, seed)
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        command = ["env", f"PYTHONPATH={ROOT}", str(HONE), "train", str(file), "--run", name]
        run = run_timed(command, folder, RUN_TIMEOUT_S)
        if run.code != 0:
            raise StageError("study", f"{arm}, seed {seed}: {run.output[-2000:]}")
    rows = RunDir(folder / "runs" / name).read_metrics()
    curves = [
        [(int(row["step"]), row[key]) for row in rows if key in row]
        for key in ("eval/pass@1", "guide/guided_fraction")
    ]
    return Curve(*curves)


def config_of(folder: Path, policy: Path, arm: str, seed: int) -> dict[str, Any]:
    """The config of an arm: the common one, the arm's own keys, and this seed's files."""
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    for section, values in ARMS[arm].items():
        config[section] = config.get(section, {}) | values
    config["run"] |= {"seed": seed}
    config["policy"] = {
        "type": "pretrained",
        "model": str(policy),
        "context_length": POLICY["context_length"],
    }
    for split in ("train", "eval"):
        path = str(folder / f"{split}.jsonl")
        config["tasks"][split] = {"use": "file", "settings": {"path": path}}
    return config


def study(folder: Path, seeds: Sequence[int], arms: Sequence[str]) -> dict[str, list[Curve]]:
    """Every arm with every seed, each seed with its own code and its own warm start; what a
    folder holds already is not run again.
    """
    curves: dict[str, list[Curve]] = {arm: [] for arm in arms}
    for seed in seeds:
        place = folder / f"seed{seed}"
        place.mkdir(parents=True, exist_ok=True)
        write_tasks(place, seed)
        policy = place / "warm"
        if not (policy / "model.safetensors").exists():
            subprocess.run(
                [sys.executable, "-m", "benchmarks.guide_study", "warm", str(place), str(seed)],
                cwd=ROOT, check=True, timeout=RUN_TIMEOUT_S,
            )  # fmt: skip
        for arm in arms:
            curves[arm].append(run_arm(place, policy, arm, seed))
            print(f"  {arm}, seed {seed}: {curves[arm][-1].last:.3f}", flush=True)
    return curves


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Held-out pass@1 without a hint, and the share of groups that needed one."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for number, (arm, runs) in enumerate(curves.items()):
        for seed, curve in enumerate(runs):
            style = {"color": f"C{number}", "label": arm if seed == 0 else None, "linewidth": 1.2}
            left.plot(*zip(*curve.pass_at_1, strict=True), **style)
            if curve.guided:
                right.plot(*zip(*curve.guided, strict=True), **style)
    left.set(xlabel="step", ylabel="held-out pass@1, no hint", ylim=(-0.02, 1.02))
    right.set(xlabel="step", ylabel="groups that needed a hint", ylim=(-0.02, 1.02))
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def rows(quick: bool) -> Iterator[Row]:
    """One row an arm; QUICK takes one seed."""
    seeds = [0] if quick else [0, 1, 2]
    with tempfile.TemporaryDirectory(prefix="hone-guide-") as folder:
        curves = study(Path(folder), seeds, list(ARMS))
    for arm, runs in curves.items():
        last = [curve.last for curve in runs]
        is_plain = arm == PLAIN
        held = max(last) < MOST_PLAIN if is_plain else min(last) > LEAST_GUIDED
        yield judged(
            f"a task that plain rollouts never solve: {arm}, held-out pass@1 without a hint, "
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ' (reduced)'}",
            ", ".join(f"{value:.3f}" for value in last),
            f"under {MOST_PLAIN}" if is_plain else f"over {LEAST_GUIDED}",
            held,
        )


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["warm"]:
        warm_policy(Path(arguments[1]), int(arguments[2]))
        return 0
    folder = Path(arguments[0]).absolute()
    curves = study(folder, [int(seed) for seed in arguments[1:]] or [0], list(ARMS))
    for arm, runs in curves.items():
        print(f"{arm:16s}", "  ".join(f"{curve.last:.3f}" for curve in runs))
    draw(curves, folder / "guide_study.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
