"""Demonstrations of the learner: one row per claim, measured in this run.

`rows(quick=True)` takes fewer tokens for the memory figures, and says so. Runs of studies are made
anew and not kept; the figures that they draw go to `runs/figures/`.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from benchmarks import cpu_matmul, entropy_study, guide_study, ppo_study, staleness_study
from benchmarks.entropy_memory import judge, measure
from benchmarks.proofs import ROOT, proven
from benchmarks.show import Part, Row

FIGURES = ROOT / "runs" / "figures"
DENSE_BYTES_PER_TOKEN = 2**20  # four arrays of float32 over the vocabulary, and some
UNIT = "tests/unit/test_"
VECTORS = ("credit", "objectives", "surrogates", "siren", "nucleus", "kl", "entropy_terms",
           "guidance", "guide", "prefix", "whitening", "segments", "packing", "logprobs", "gae",
           "value_loss", "published_values", "splits", "cpu_matmul")  # fmt: skip
PROPERTIES = ("tests/integration/test_packed_attention.py", "tests/integration/test_gym_steps.py")
METHODS = "tests/integration/test_learner_methods.py"


def rows(quick: bool) -> Iterator[Row | Part]:
    yield _tests(
        "published values of the methods, and properties of them",
        [*(f"{UNIT}{name}.py" for name in VECTORS), *PROPERTIES],
    )
    yield _tests(
        "each loss but kl_cov equals its slow reference in float64, with either attention",
        [METHODS, "-k", "float64"],
    )
    yield _tests("two ranks give the update of one, within 1e-5", [METHODS, "-k", "two_ranks"])
    yield proven(
        "1, 2 and 4 ranks give the same update: odd sizes, empty micro-batches, idle ranks",
        ["tests/integration/test_learner_ranks.py"],
        "weights within 1e-5",
        {"max_abs_weight_difference": 1e-5},
    )
    yield _tests(
        "other micro-batches give the same update, within 1e-5", [METHODS, "-k", "microbatches"]
    )
    yield _tests(
        "critic: values and gradients equal their slow reference; checkpoint; pre-training",
        ["tests/integration/test_critic.py", "tests/integration/test_critic_pretraining.py"],
    )
    yield _tests(
        "hinted rollouts are learned without the hint; a wrong hint costs a dropped group",
        ["tests/integration/test_weight_sync.py", "-k", "hints"],
    )
    yield _tests(
        "LoRA: only adapters learn; checkpoint, export and engines get what the learner computes",
        ["tests/integration/test_lora.py"],
    )
    yield Part("memory and time of SIREN", lambda: _memory(quick))
    yield Part("products on a CPU", cpu_matmul.rows)
    with tempfile.TemporaryDirectory(prefix="hone-show-") as folder:
        place = Path(folder)
        yield Part(
            "Guide in kind",
            lambda: drawn(guide_study.rows(quick, place), place / "guide_study.svg"),
        )
        yield Part("staleness study", lambda: staleness_study.rows(quick, place))
        yield Part(
            "SIREN in kind",
            lambda: drawn(entropy_study.rows(quick, place), place / "entropy_study.svg"),
        )
        yield Part("PPO with a critic", lambda: ppo_study.rows(quick, place))


def drawn(rows: Iterable[Row], figure: Path) -> Iterator[Row]:
    """`rows`, and then the `figure` that they left, kept where it stays."""
    yield from rows
    FIGURES.mkdir(parents=True, exist_ok=True)
    print(f"figure: {shutil.copy(figure, FIGURES)}")


def _tests(claim: str, arguments: list[str]) -> Row:
    return proven(claim, arguments, "all pass")


def _memory(quick: bool) -> Iterator[Row]:
    num_tokens = 1024 if quick else 8192
    what = f"{num_tokens} tokens x 49152 words" + (" (reduced)" if quick else "")
    needed = num_tokens * DENSE_BYTES_PER_TOKEN
    if psutil.virtual_memory().available < needed:
        yield Row(
            f"memory and time of log-prob and SIREN, {what}", "-", "at most 1/8 and 2x",
            "not shown here", f"the dense side needs {needed / 2**30:.0f} GiB of free memory",
        )  # fmt: skip
        return
    yield from judge(measure(num_tokens), what)
