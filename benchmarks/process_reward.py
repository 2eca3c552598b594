"""`python -m benchmarks.process_reward [RUN MODEL]`: how well step scorers tell right from wrong.

Without arguments a policy is warmed up briefly on sums of three numbers, so that it makes mistakes,
and `hone rewards train-process` makes a process model of its rollouts, in a temporary place.
Tasks of the run's held-out set whose question no training trace had are sampled by its newest
checkpoint. A step is right when all lines up to it are those of the worked solution, or the bare
answer. Printed as JSON: for each scorer the AUC over all steps and over those up to the first wrong
one, and the accuracy of best-of-n beside that of the majority vote and of one sample.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from actors.process_training import TraceSampler
from cluster import config_file
from cluster.config import Config, VerifierConfig
from cluster.run_dir import RunDir
from cluster.types import Task, TrajectoryGroup
from learners.process_model import auc
from rewards.rubric import Rubric
from rewards.steps import compile_separator, split_steps
from rewards.tasksets import load_tasks
from serve import export
from serve.process_training import TRACES

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "deploy" / "configs" / "quickstart.yaml"
WARM_START = ("run.steps=1", "eval.every=1", "eval.tasks=8", "policy.hidden_size=64",
              "policy.num_heads=2", "policy.context_length=96", "warm_start.steps=500",
              "warm_start.lr=4.0e-3", "warm_start.direct_fraction=0.15",
              "rollout.max_new_tokens=48")  # fmt: skip
EVAL_SIZE = 800  # of 4,000 questions; about half are left when those of the traces are taken out
TRAINING = ("--tasks", "2000", "--traces", "12", "--completions", "0",
            "--epochs", "8", "--lr", "2e-3")  # fmt: skip
STAND_INS = ("arithmetic", "likelihood_answer", "likelihood_step")
NUM_TASKS, NUM_SAMPLES = 200, 8
LINES = compile_separator(r"\n+")


def main(arguments: list[str]) -> None:
    if arguments:
        print(json.dumps(measure(*arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="hone-process-") as place:
        run, model = make(Path(place))
        print(json.dumps(measure(str(run), str(model))))


def make(place: Path) -> tuple[Path, Path]:
    """A run of one step and a process model of its rollouts, by the commands that a user has."""
    run, model = place / "runs" / "sums", place / "process-model"
    settings = [f"tasks.{split}.settings.config.{side}_terms=3"
                for split in ("train", "eval") for side in ("min", "max")]  # fmt: skip
    settings.append(f"tasks.eval.settings.size={EVAL_SIZE}")
    _hone(place, "train", str(QUICKSTART), "--run", run.name, *settings, *WARM_START)
    _hone(place, "rewards", "train-process", str(run), str(model), *TRAINING)
    return run, model


def measure(run: str, model: str) -> dict[str, Any]:
    """See the module; shares and AUCs by scorer."""
    run_dir = RunDir.open(run)
    config = config_file.load(run_dir.config)
    with tempfile.TemporaryDirectory() as place:
        policy_dir = export.write(run_dir, Path(place) / "policy", None)
        return asyncio.run(_measure(config, policy_dir, model))


def _hone(place: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments], cwd=place, check=True, timeout=1800,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip


async def _measure(config: Config, policy_dir: Path, model: str) -> dict[str, Any]:
    tasks = _unseen(load_tasks(config.tasks, "eval"), Path(model) / TRACES)[:NUM_TASKS]
    sampler = TraceSampler(config, policy_dir)
    try:
        await sampler.start()
        groups = await asyncio.gather(
            *(sampler.sample(task, NUM_SAMPLES, 7000 + i) for i, task in enumerate(tasks))
        )
    finally:
        await sampler.close()
    results: dict[str, Any] = {
        "tasks": len(tasks),
        "one": float(np.mean([r for group in groups for r in group.rewards if r is not None])),
        "unknown": sum(reward is None for group in groups for reward in group.rewards),
        "any": float(np.mean([any(group.rewards) for group in groups])),
        "majority": float(np.mean([_majority(group) for group in groups])),
    }
    truths = [[_truth(group.task, t.text) for t in group.trajectories] for group in groups]
    for name, scorer in scorers(str(policy_dir), model).items():
        started = time.perf_counter()
        rubric = Rubric({"steps": process(scorer)}, str(policy_dir))
        try:
            scored = [await rubric.score(group) for group in groups]
        finally:
            await rubric.close()
        results[name] = _figures(scored, truths, groups) | {"s": time.perf_counter() - started}
    return results


def _unseen(tasks: list[Task], traces: Path) -> list[Task]:
    """The tasks of which there is no training trace; an id is a hash of question and answer."""
    with traces.open() as lines:
        seen = {json.loads(line)["task"]["task_id"] for line in lines}
    return [task for task in tasks if task.task_id not in seen]


def scorers(policy_dir: str, model: str) -> dict[str, dict[str, Any]]:
    """The trained model and the stand-ins that need none."""
    likelihood = {"model": policy_dir, "answer_format": "{answer}"}
    return {
        "trained": {"use": "classifier", "settings": {"model": model}},
        "arithmetic": {"use": "arithmetic"},
        "likelihood_answer": {"use": "likelihood", "settings": likelihood},
        "likelihood_step": {"use": "likelihood", "settings": likelihood | {"target": "step"}},
    }


def process(scorer: dict[str, Any]) -> VerifierConfig:
    return VerifierConfig(use="process", settings={"scorer": scorer}, timeout_s=120)


def _truth(task: Task, text: str) -> list[bool]:
    """For each step whether all up to it stand in the worked solution."""
    solution = [line.strip() for line in task.solution.splitlines()]
    lines = [step.strip() for step in split_steps(text, LINES)]
    if lines == [task.reference]:
        return [True]
    return [lines[: i + 1] == solution[: i + 1] for i in range(len(lines))]


def _figures(
    scored: list[TrajectoryGroup], truths: list[list[list[bool]]], groups: list[TrajectoryGroup]
) -> dict[str, float]:
    """Step AUC, AUC up to each trace's first wrong step, abstentions, best-of-n accuracy."""
    scores: list[float] = []
    is_right: list[bool] = []
    is_early: list[bool] = []
    num_abstained = 0
    best: list[float] = []
    for result, truth, group in zip(scored, truths, groups, strict=True):
        totals = []
        for trajectory, steps, given in zip(
            result.trajectories, truth, group.trajectories, strict=True
        ):
            (verdict,) = trajectory.verdicts
            if given.reward is not None:  # its own check could not be made
                totals.append((-1.0 if verdict.score is None else verdict.score, given.reward))
            num_abstained += verdict.score is None
            if verdict.score is None or len(verdict.step_scores) != len(steps):
                continue
            scores += [score for _, score in verdict.step_scores]
            is_right += steps
            first_wrong = steps.index(False) if False in steps else len(steps)
            is_early += [i <= first_wrong for i in range(len(steps))]
        if not totals:
            continue
        top = max(score for score, _ in totals)
        best.append(float(np.mean([reward for score, reward in totals if score == top])))
    values, right, early = np.array(scores), np.array(is_right), np.array(is_early)
    return {
        "auc": auc(values, right),
        "auc_first_error": auc(values[early], right[early]),
        "steps": float(len(values)),
        "share_right": float(right.mean()),
        "abstained": float(num_abstained),
        "best_of_n": float(np.mean(best)),
    }


def _majority(group: TrajectoryGroup) -> float:
    """Expected accuracy of the most frequent final line, ties drawn at random."""
    answers = [(split_steps(t.text, LINES) or [""])[-1].strip() for t in group.trajectories]
    counts = Counter(answers)
    top = [answer for answer, count in counts.items() if count == max(counts.values())]
    return float(np.mean([answer == group.task.reference for answer in top]))


if __name__ == "__main__":
    main(sys.argv[1:])
