"""Guide in kind: a policy that can follow hints learns to do without them what GRPO never finds.

Tasks are messages in a secret code (`benchmarks.secret_code`). The policy starts from a warm start
on codes drawn anew each time, so it can follow a hint, not quite reliably, and can only guess where
there is none. Nothing ever shows it the secret code but the hints of tasks whose plain rollouts all
failed. Held-out messages are never trained on and never hinted. Each seed has a code, a warm start
and messages of its own. Run with `python -m benchmarks.guide_study FOLDER [NUM_SEEDS]`;
`benchmarks.show_learner` has rows of it.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.proofs import ROOT
from benchmarks.secret_code import TEMPLATE, warm_examples, write_tasks
from benchmarks.show import Row, judged
from benchmarks.study import Run, figure, mean_curve, train
from cluster import config_file
from cluster.errors import StageError
from cluster.types import Message
from learners.learner import Learner
from learners.policy_dir import prepare
from learners.tokenizer import encode_completion, load_tokenizer, render
from serve.charts import Chart, Series

CONFIG = ROOT / "benchmarks" / "secret_code.yaml"
FIGURE = ROOT / "docs" / "guide_study.svg"
MOST_PLAIN, LEAST_GUIDED = 0.02, 0.30  # bounds of pass@1
NUM_TOKENIZER_TEXTS = 500
PASS = "eval/pass@1"
PROGRAM = {"use": "guide", "settings": {"template": TEMPLATE, "reject": ""}}
GUIDED = f"rollout.program={json.dumps(PROGRAM)}"
APART = {"use": "guide", "settings": {"factors": "apart", "shaping": "truncate"}}
ARMS: dict[str, list[str]] = {
    "Guide-GRPO": [GUIDED, "objective.losses={policy: {use: guide}}"],
    "Guide-PPO": [
        GUIDED,
        f"objective.losses={json.dumps({'policy': APART})}",
        "objective.credit={use: gae}",
        "critic={lr: 1.0e-3}",
        "learner.minibatches=2",
    ],
    "GRPO": [],
}
Results = dict[str, list[Run]]


def measure(folder: Path, seeds: Sequence[int], arms: Sequence[str]) -> Results:
    """Runs by arm, one per seed; what an interrupted study left in `folder` is taken as it is."""
    results: Results = {arm: [] for arm in arms}
    for seed in seeds:
        place = folder.absolute() / f"code-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        write_tasks(place, seed)
        policy = warm_policy(place, seed)
        start: list[str] = [
            f"run.seed={seed}",
            "warm_start=null",
            f"policy={{type: pretrained, model: {policy}, context_length: 24}}",
            *(f"tasks.{split}.settings.path={place / split}.jsonl" for split in ("train", "eval")),
        ]
        for arm in arms:
            results[arm].append(train(CONFIG, place, arm, [*start, *ARMS[arm]]))
    return results


def warm_policy(place: Path, seed: int) -> Path:
    """A directory with the policy after its warm start, made here once."""
    if (place / "warm").is_dir():
        return place / "warm"
    config = config_file.load(CONFIG, [f"run.seed={seed}"])
    assert config.warm_start is not None
    examples = warm_examples(config.warm_start.examples, seed)
    texts = [text for pair in examples[:NUM_TOKENIZER_TEXTS] for text in pair]
    policy_dir = prepare(config.policy, texts, place / "cache", place / "tiny", seed)
    tokenizer = load_tokenizer(policy_dir)

    def encoded(prompt: str, answer: str) -> Any:
        context = render(tokenizer, [Message(role="user", content=prompt)])
        return context, encode_completion(tokenizer, answer)

    learner = Learner(
        config=config,
        policy_dir=policy_dir,
        rank=0,
        world_size=1,
        master="",
        num_threads=1,
    )
    for _ in learner.warm_start([encoded(*example) for example in examples]):
        pass
    learner.export_hf(place / "warming")
    learner.close()
    return (place / "warming").rename(place / "warm")


def table(results: Results) -> Table:
    """Held-out pass@1 without a hint, before and after, and groups that needed a hint."""
    rows = Table("arm", "seed", "pass@1 before", "after", "hinted at first", "at last")
    for arm, runs in results.items():
        for seed, run in enumerate(runs):
            hinted = run.curve("guide/guided_fraction")
            shares = [f"{hinted[0][1]:.2f}", f"{hinted[-1][1]:.2f}"] if hinted else ["-", "-"]
            passes = [f"{value:.3f}" for value in (run.first(PASS), run.last(PASS))]
            rows.add_row(arm, str(seed), *passes, *shares)
    return rows


def drawing(results: Results) -> str:
    """Means over the seeds."""
    passes = [Series(arm, mean_curve(runs, PASS)) for arm, runs in results.items()]
    hinted = [
        Series(arm, points)
        for arm, runs in results.items()
        if (points := mean_curve(runs, "guide/guided_fraction"))
    ]
    return figure(
        [
            Chart("held-out pass@1 without a hint", "pass@1", passes, bounds=(0.0, 1.0)),
            Chart("groups that needed a hint", "share", hinted, bounds=(0.0, 1.0)),
        ]
    )


def rows(quick: bool) -> Iterator[Row]:
    """One row an arm; QUICK takes one seed."""
    seeds = range(1 if quick else 3)
    try:
        with tempfile.TemporaryDirectory(prefix="hone-guide-") as folder:
            results = measure(Path(folder), seeds, list(ARMS))
    except StageError as error:
        yield judged("Guide on a secret code", "a run failed", "runs end", False, str(error)[-300:])
        return
    for arm, runs in results.items():
        last = [run.last(PASS) for run in runs]
        is_plain = arm == "GRPO"
        held = max(last) < MOST_PLAIN if is_plain else min(last) > LEAST_GUIDED
        yield judged(
            f"a task that plain rollouts never solve: {arm}, held-out pass@1 without a hint, "
            + ("one seed (reduced)" if quick else "three seeds"),
            ", ".join(f"{value:.3f}" for value in last),
            f"under {MOST_PLAIN}" if is_plain else f"over {LEAST_GUIDED}",
            held,
        )


if __name__ == "__main__":
    num_seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    found = measure(Path(sys.argv[1]), range(num_seeds), list(ARMS))
    Console().print(table(found))
    FIGURE.write_text(drawing(found))
