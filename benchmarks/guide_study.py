"""Guide in kind: a policy that can follow hints learns to do without them what GRPO never finds.

Tasks are messages in a secret code (`benchmarks.secret_code`). The policy starts from a warm start
on codes drawn anew each time, so it can follow a hint, not quite reliably, and can only guess where
there is none. Nothing ever shows it the secret code but the hints of tasks whose plain rollouts all
failed: passes among hinted rollouts join the plain failures of their task, in one arm the hinted
group stands alone, and in one some hints are wrong. Held-out messages are never trained on and
never hinted. Guide-PPO does not whiten: its critic foresees that plain rollouts fail, and whitening
would push them down for that. Each seed has a code, a warm start and messages of its own.
`benchmarks.show_learner` has rows of it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.proofs import ROOT
from benchmarks.secret_code import TEMPLATE, WRONG_FRACTION, warm_tasks, write_tasks
from benchmarks.show import Row, judged
from benchmarks.study import Run, figure, main, mean_curve, train, warm_started
from cluster.config import Config
from cluster.types import Task
from serve.charts import Chart, Series

CONFIG = ROOT / "benchmarks" / "secret_code.yaml"
MOST_PLAIN = 0.02  # bound of pass@1
LEAST = 0.30  # of every arm with hints
PASS = "eval/pass@1"


def _program(merge: str) -> str:
    settings = {"template": TEMPLATE, "merge": merge, "reject": ""}
    return f"rollout.program={json.dumps({'use': 'guide', 'settings': settings})}"


GUIDED = _program("fill_wrong")  # hinted passes join the plain failures
LOSS = "objective.losses={policy: {use: guide}}"
APART = {"use": "guide", "settings": {"factors": "apart", "shaping": "truncate"}}
ARMS: dict[str, list[str]] = {
    "Guide-GRPO": [GUIDED, LOSS],
    "hinted alone": [_program("replace"), LOSS],
    "misled": [GUIDED, LOSS],
    "Guide-PPO": [
        GUIDED,
        f"objective.losses={json.dumps({'policy': APART})}",
        "objective.credit={use: gae, settings: {whitening: false}}",
        "critic={lr: 1.0e-3}",
        "learner.minibatches=2",
    ],
    "GRPO": [],
}
HOW = {
    "Guide-GRPO": "merge: fill_wrong",
    "Guide-PPO": "merge: fill_wrong",
    "hinted alone": "Guide-GRPO, merge: replace, the default",
    "misled": f"Guide-GRPO, {WRONG_FRACTION:.0%} of the tasks with wrong hints",
}
Results = dict[str, list[Run]]


def measure(folder: Path, seeds: Sequence[int], arms: Sequence[str]) -> Results:
    """Runs by arm, one per seed."""
    results: Results = {arm: [] for arm in arms}
    for seed in seeds:
        place = folder.absolute() / f"code-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        write_tasks(place, seed)
        start = [
            *warm_started(CONFIG, place / "warm", seed, _warm_tasks),
            *(f"tasks.{split}.settings.path={place / split}.jsonl" for split in ("train", "eval")),
        ]
        for arm in arms:
            misled = [f"tasks.train.settings.path={place / 'misled.jsonl'}"]
            changes = [*start, *ARMS[arm], *(misled if arm == "misled" else [])]
            results[arm].append(train(CONFIG, place, arm.replace(" ", "-"), changes))
    return results


def _warm_tasks(config: Config) -> list[Task]:
    assert config.warm_start is not None
    return warm_tasks(config.warm_start.examples, config.run.seed)


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


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """One row an arm; QUICK takes one seed."""
    results = measure(folder, range(1 if quick else 3), list(ARMS))
    (folder / "guide_study.svg").write_text(drawing(results))
    Console().print(table(results))
    plain = max(value for run in results["GRPO"] for _, value in run.curve(PASS))
    for arm, runs in results.items():
        last = [run.last(PASS) for run in runs]
        bound, held = f"under {MOST_PLAIN}", plain < MOST_PLAIN
        if arm != "GRPO":
            bound, held = f"over {LEAST}", min(last) > LEAST
        how = f" ({HOW[arm]})" if arm in HOW else ""
        yield judged(
            f"a task that plain rollouts never solve: {arm}{how}, held-out pass@1 without a hint, "
            + ("one seed (reduced)" if quick else "three seeds"),
            ", ".join(f"{value:.3f}" for value in last),
            bound,
            held,
        )


if __name__ == "__main__":
    main(rows)
