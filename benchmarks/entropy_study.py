"""SIREN and what it is compared with, on riddles with several ways to solve them.

All methods of a seed start from one warm-started policy, sample the same riddles and differ in
their losses only. Training riddles favour one way a little, held-out ones none (see
`benchmarks.riddles`): the reward drives a policy into one way, where pass@8 is pass@1. What is
gained by that in training no held-out riddle shows; a method that keeps all ways forgoes it, and
the rows print how much.

The policy loss is divided by three times the length of a completion, as the released script does.
The peak quantile leaves one token of the eight of a completion, mostly the one that names the way;
the nucleus holds all four ways, where .8 would let go of the two rarest. `siren/peak_entropy` is
measured for every method, by a SIREN term of weight 0. Coefficients were chosen by a simulation of
the ways and digits as plain softmaxes, before any run: beta between .02 and .2 kept the entropy,
and .02 was the largest bonus that kept the digits right (.03 made all tokens uniform).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.proofs import ROOT
from benchmarks.show import Row, judged
from benchmarks.study import (
    Run,
    figure,
    main,
    mean_curve,
    train,
    training_tasks,
    warm_started,
)
from serve.charts import Chart, Series

CONFIG = ROOT / "benchmarks" / "riddles.yaml"
LAST_STEPS = 10  # entropies are means over these
PEAKS = {"peak_quantile": 0.9, "nucleus_mass": 0.95}
BETA, BONUS = 0.05, 0.02

Losses = Mapping[str, Mapping[str, Any]]


def _losses(
    token_filter: str | None = None, beta: float = 0.0, **terms: Mapping[str, Any]
) -> Losses:
    settings: dict[str, Any] = {"aggregation": "constant", "constant": 24}
    if token_filter is not None:
        settings["token_filter"] = {"use": token_filter}
    siren = {"use": "siren", "settings": PEAKS | {"beta": beta}, "weight": float(beta > 0)}
    return {"policy": {"use": "policy_gradient", "settings": settings}, "siren": siren, **terms}


METHODS: dict[str, Losses] = {
    "GRPO": _losses(),
    "80/20 mask": _losses(token_filter="forking_tokens"),
    f"bonus {BONUS}": _losses(bonus={"use": "entropy_bonus", "settings": {"coefficient": BONUS}}),
    f"SIREN {BETA}": _losses(beta=BETA),
}
BASELINE, SIREN = "GRPO", f"SIREN {BETA}"
COLLAPSED, NEAR = 0.5, (0.75, 1.25)  # shares of the anchor
SAMPLES, NOISE = 8, 0.02  # of a mean over the seeds
Results = dict[str, list[Run]]


def start(folder: Path, seed: int) -> list[str]:
    """Changes that start a run of riddles from the policy of `seed` after its warm start."""
    return warm_started(CONFIG, folder / f"policy-{seed}", seed, training_tasks)


def measure(folder: Path, seeds: Sequence[int], methods: Sequence[str]) -> Results:
    """Runs by method, one per seed."""
    results: Results = {method: [] for method in methods}
    for seed in seeds:
        changes = start(folder, seed)
        for method in methods:
            name = f"{method.replace(' ', '-').replace('/', '-')}-{seed}"
            losses = f"objective.losses={json.dumps(METHODS[method])}"
            results[method].append(train(CONFIG, folder, name, [*changes, losses]))
    return results


def mean(runs: Sequence[Run], key: str, num_steps: int = 1) -> float:
    return fmean(run.last(key, num_steps) for run in runs)


def kept(run: Run) -> float:
    """Entropy of the peak tokens at the end, as a share of the anchor."""
    return run.last("siren/peak_entropy", LAST_STEPS) / run.first("siren/anchor")


def table(results: Results) -> Table:
    """Means over the seeds, at the start and after the last step."""
    first = next(iter(results.values()))
    rows = Table("method", "pass@1", f"pass@{SAMPLES}", "peak entropy", "entropy", "reward")
    rows.add_row(
        "warm start", *(f"{fmean(r.first(f'eval/pass@{k}') for r in first):.3f}" for k in "1k")
    )
    for method, runs in results.items():
        rows.add_row(
            method,
            *(f"{mean(runs, f'eval/pass@{k}'):.3f}" for k in "1k"),
            f"{fmean(map(kept, runs)):.2f} of the anchor",
            f"{mean(runs, 'policy/entropy', LAST_STEPS):.3f}",
            f"{mean(runs, 'reward/mean', LAST_STEPS):.3f}",
        )
    return rows


def drawing(results: Results) -> str:
    """Entropy, pass@1 and pass@8 over the steps, means over the seeds."""
    charts = [
        Chart(
            title=title,
            unit=title,
            series=[Series(method, mean_curve(runs, key)) for method, runs in results.items()],
        )
        for title, key in (
            ("entropy of peak tokens, nats", "siren/peak_entropy"),
            ("held-out pass@1", "eval/pass@1"),
            ("held-out pass@8", "eval/pass@k"),
        )
    ]
    return figure(charts)


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """QUICK compares GRPO and SIREN on one seed, else all methods on three."""
    methods = [BASELINE, SIREN] if quick else list(METHODS)
    results = measure(folder, range(1 if quick else 3), methods)
    (folder / "entropy_study.svg").write_text(drawing(results))
    Console().print(table(results))
    grpo, siren = results[BASELINE], results[SIREN]
    what = f"riddles with several ways, {len(siren)} seed(s)" + (" (reduced)" if quick else "")
    yield judged(
        f"GRPO's entropy collapses, SIREN's stays near its anchor; {what}",
        "; ".join(
            f"{method} {', '.join(f'{kept(run):.2f}' for run in runs)}"
            for method, runs in results.items()
        )
        + " of the anchor",
        f"in every run GRPO at most {COLLAPSED}, SIREN {NEAR[0]} to {NEAR[1]}",
        all(kept(run) <= COLLAPSED for run in grpo)
        and all(NEAR[0] <= kept(run) <= NEAR[1] for run in siren),
    )
    rewards = ", ".join(
        f"{method} {mean(runs, 'reward/mean', LAST_STEPS):.3f}" for method, runs in results.items()
    )
    for k, bound, least in (
        ("k", f"more than {NOISE} above GRPO's", NOISE),
        ("1", f"not lower than GRPO's, {NOISE} of noise allowed", -NOISE),
    ):
        gain = mean(siren, f"eval/pass@{k}") - mean(grpo, f"eval/pass@{k}")
        yield judged(
            f"held-out pass@{SAMPLES if k == 'k' else 1} after SIREN, {what}",
            ", ".join(f"{m} {mean(r, f'eval/pass@{k}'):.3f}" for m, r in results.items())
            + f"; reward in training, which favours one way: {rewards}",
            bound,
            gain > least,
        )


if __name__ == "__main__":
    main(rows)
