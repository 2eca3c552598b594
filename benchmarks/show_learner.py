"""Demonstrations of the learner: one row per claim, measured in this run.

`rows(quick=True)` takes fewer tokens for the memory figures, and says so.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks import guide_study, ppo_quickstart
from benchmarks.entropy_memory import measure
from benchmarks.show import Row

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900
DENSE_BYTES_PER_TOKEN = 3 * 2**20  # measured: 2.3 MiB a token
UNIT = "tests/unit/test_"
VECTORS = ("credit", "objectives", "surrogates", "siren", "nucleus", "kl", "entropy_terms",
           "guidance", "whitening", "segments", "gae", "value_loss")  # fmt: skip
METHODS = "tests/integration/test_learner_methods.py"
NO_RUN = "needs training runs over three seeds; no script for it yet"


def rows(quick: bool) -> Iterator[Row]:
    yield _tests(
        "published values of every method, and properties of them",
        [f"{UNIT}{name}.py" for name in VECTORS],
    )
    yield _tests(
        "each loss equals its slow reference in float64, packed and padded",
        [METHODS, "-k", "float64"],
    )
    yield _tests("two ranks give the update of one, within 1e-5", [METHODS, "-k", "two_ranks"])
    yield _tests(
        "other micro-batches give the same update, within 1e-5", [METHODS, "-k", "microbatches"]
    )
    yield _tests(
        "critic: values and gradients equal their slow reference; checkpoint; pre-training",
        ["tests/integration/test_critic.py"],
    )
    yield from _memory(quick)
    yield from guide_study.rows(quick)
    yield Row("four ranks give the update of one", "-", "1e-5", "not shown here", "two are run")
    for claim, bound in (
        ("SIREN keeps entropy near its anchor, pass@8 above GRPO's", "pass@1 not lower"),
        ("policy age up to 8: naive, decoupled, TIS", "one table"),
    ):
        yield Row(claim, "-", bound, "not shown here", NO_RUN)
    with tempfile.TemporaryDirectory(prefix="hone-show-") as folder:
        yield from ppo_quickstart.rows(quick, Path(folder))


def _tests(claim: str, arguments: list[str]) -> Row:
    """A claim that holds when all its tests pass."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    passed, failed = (
        sum(int(count) for count in re.findall(rf"(\d+) (?:{words})\b", run.stdout))
        for words in ("passed", "failed|errors?")
    )
    is_held = run.returncode == 0 and passed > 0
    return Row(
        claim, f"{passed} tests passed, {failed} failed", "all pass",
        "holds" if is_held else "falls short",
    )  # fmt: skip


def _memory(quick: bool) -> Iterator[Row]:
    num_tokens = 1024 if quick else 8192
    what = f"{num_tokens} tokens x 49152 words" + (" (reduced)" if quick else "")
    needed = num_tokens * DENSE_BYTES_PER_TOKEN
    if psutil.virtual_memory().available < needed:
        yield Row(
            f"memory and time of nucleus entropy, {what}", "-", "at most 1/8 and 2x",
            "not shown here", f"the dense side needs {needed / 2**30:.0f} GiB of free memory",
        )  # fmt: skip
        return
    costs = measure(num_tokens)
    share = costs["chunked"].extra_bytes / costs["dense"].extra_bytes
    yield Row(
        f"extra memory of log-prob and nucleus entropy against dense, {what}",
        f"1/{1 / max(share, 1e-9):.0f}", "at most 1/8",
        "holds" if share <= 1 / 8 else "falls short",
    )  # fmt: skip
    slowdown = costs["chunked"].seconds / costs["logprobs"].seconds
    yield Row(
        f"time with nucleus entropy against log-prob alone, {what}",
        f"{slowdown:.2f}x", "at most 2x", "holds" if slowdown <= 2 else "falls short",
    )  # fmt: skip
    gap = abs(costs["chunked"].checksum / costs["dense"].checksum - 1)
    yield Row(
        "chunked and dense gradients have the same size", f"{gap:.1e} apart", "1e-4",
        "holds" if gap <= 1e-4 else "falls short",
    )  # fmt: skip
