"""SIREN and what it is compared with, on riddles with several ways to solve them.

All methods of a seed start from one warm-started policy, sample the same riddles and differ in
their losses only. Coefficients are the published ones, for a policy loss divided by 3072, and a
tenth of them where a method has one. `siren/peak_entropy` is measured for every method by a SIREN
term of weight 0. Run with `python -m benchmarks.entropy_study FOLDER [NUM_SEEDS [METHOD ...]]`.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.proofs import ROOT
from benchmarks.show import Row, judged
from benchmarks.study import Run, figure, mean_curve, train, warm_started
from serve.charts import Chart, Series

CONFIG = ROOT / "benchmarks" / "riddles.yaml"
FIGURE = ROOT / "docs" / "entropy_study.svg"
LAST_STEPS = 10  # entropies are means over these
PER_RESPONSE = {"aggregation": "constant", "constant": 3072}
MEASURED = {"use": "siren", "weight": 0.0}

Losses = Mapping[str, Mapping[str, Any]]


def _losses(token_filter: str | None = None, **terms: Mapping[str, Any]) -> Losses:
    settings = PER_RESPONSE | (
        {"token_filter": {"use": token_filter}} if token_filter is not None else {}
    )
    return {"policy": {"use": "policy_gradient", "settings": settings}, "siren": MEASURED, **terms}


def _bonus(coefficient: float) -> Losses:
    return _losses(bonus={"use": "entropy_bonus", "settings": {"coefficient": coefficient}})


def _siren(beta: float) -> Losses:
    return _losses(siren={"use": "siren", "settings": {"beta": beta}})


METHODS: dict[str, Losses] = {
    "GRPO": _losses(),
    "80/20 mask": _losses(token_filter="forking_tokens"),
    "bonus 0.005": _bonus(0.005),
    "bonus 0.0005": _bonus(0.0005),
    "SIREN 0.005": _siren(0.005),
    "SIREN 0.0005": _siren(0.0005),
}
BASELINE, SIREN = "GRPO", "SIREN 0.005"
COLLAPSED, NEAR = 0.5, (0.75, 1.25)  # shares of the anchor
SAMPLES, NOISE = 8, 0.02
Results = dict[str, list[Run]]


def measure(folder: Path, seeds: Sequence[int], methods: Sequence[str]) -> Results:
    """Runs by method, one per seed."""
    results: Results = {method: [] for method in methods}
    for seed in seeds:
        start = warm_started(CONFIG, folder, seed)
        for method in methods:
            name = f"{method.replace(' ', '-').replace('/', '-')}-{seed}"
            losses = f"objective.losses={json.dumps(METHODS[method])}"
            results[method].append(train(CONFIG, folder, name, [*start, losses]))
    return results


def mean(runs: Sequence[Run], key: str, num_steps: int = 1) -> float:
    return fmean(run.last(key, num_steps) for run in runs)


def anchor(runs: Sequence[Run]) -> float:
    return fmean(run.first("siren/anchor") for run in runs)


def table(results: Results) -> Table:
    """Means over the seeds, at the start and after the last step."""
    start = next(iter(results.values()))
    rows = Table("method", "pass@1", "pass@8", "peak entropy", "anchor", "entropy")
    rows.add_row(
        "warm start", *(f"{fmean(r.first(f'eval/pass@{k}') for r in start):.3f}" for k in "1k")
    )
    for method, runs in results.items():
        rows.add_row(
            method,
            *(f"{mean(runs, f'eval/pass@{k}'):.3f}" for k in "1k"),
            f"{mean(runs, 'siren/peak_entropy', LAST_STEPS):.3f}",
            f"{anchor(runs):.3f}",
            f"{mean(runs, 'policy/entropy', LAST_STEPS):.3f}",
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
    Console().print(table(results))
    grpo, siren = results[BASELINE], results[SIREN]
    kept = {m: mean(r, "siren/peak_entropy", LAST_STEPS) / anchor(r) for m, r in results.items()}
    what = f"riddles with several ways, {len(siren)} seed(s)" + (" (reduced)" if quick else "")
    yield judged(
        f"GRPO's entropy collapses, SIREN's stays near its anchor; {what}",
        ", ".join(f"{method} {share:.2f}" for method, share in kept.items()) + " of the anchor",
        f"GRPO at most {COLLAPSED}, SIREN {NEAR[0]} to {NEAR[1]}",
        kept[BASELINE] <= COLLAPSED and NEAR[0] <= kept[SIREN] <= NEAR[1],
    )
    for k, bound, least in (("k", "above GRPO's", 0.0), ("1", "not lower than GRPO's", -NOISE)):
        gain = mean(siren, f"eval/pass@{k}") - mean(grpo, f"eval/pass@{k}")
        yield judged(
            f"held-out pass@{SAMPLES if k == 'k' else 1} after SIREN, {what}",
            ", ".join(f"{m} {mean(r, f'eval/pass@{k}'):.3f}" for m, r in results.items()),
            bound + (f", {NOISE} of noise allowed" if least else ""),
            gain > least,
        )


if __name__ == "__main__":
    num_seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    found = measure(Path(sys.argv[1]), range(num_seeds), sys.argv[3:] or list(METHODS))
    Console().print(table(found))
    FIGURE.write_text(drawing(found))
