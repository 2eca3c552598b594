"""`make show AREA=foundation`: the whole loop on real parts, in one command."""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.proofs import ROOT, Timed, proven, run_timed
from benchmarks.replay_buffer import measure
from benchmarks.show import Row, judged
from cluster.run_dir import RunDir

HONE = Path(sys.executable).parent / "hone"
QUICKSTART = ROOT / "deploy" / "configs" / "quickstart.yaml"
SMOLLM2 = ROOT / "deploy" / "configs" / "smollm2_cpu.yaml"
BUFFER_TESTS = ("buffer", "leases", "faults", "lost_replies", "model")
GAIN, MISMATCH = 0.25, 1e-4
QUICKSTART_S, FEEDBACK_S, TEST_S = 600.0, 1.0, 1800.0


def rows(quick: bool) -> Iterator[Row]:
    """Cheap rows first; QUICK runs one quickstart seed and leaves out the test run."""
    yield bad_input()
    yield from held_by_tests()
    yield buffer_throughput(quick)
    with tempfile.TemporaryDirectory(prefix="hone-show-") as folder:
        yield pretrained_policy(Path(folder))
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True, timeout=120)
        yield from quickstart(clone, seeds=[0] if quick else [0, 1, 2])
        yield suite(clone, quick)


class BadInput(NamedTuple):
    name: str
    arguments: list[str]
    expected: str  # what the error line must say


BAD_INPUTS = [
    BadInput("unknown key", ["rollout.group_sise=4"], "group_size"),
    BadInput("wrong type", ["rollout.group_size=many"], r"rollout\.group_size"),
    BadInput("missing file", ["tasks.train={use: file, settings: {path: no.jsonl}}"], r"no\.jsonl"),
    BadInput(
        "prompt longer than the context",
        ["policy.context_length=100", "rollout.max_new_tokens=95"],
        r"prompt.*policy\.context_length|policy\.context_length.*prompt",
    ),
    BadInput("group of one", ["rollout.group_size=1"], r"rollout\.group_size"),
    BadInput("unreachable Redis", ["buffer.url=redis://127.0.0.1:1"], r"127\.0\.0\.1:1"),
    BadInput("unknown plug-in", ["rewards.verifiers.correct.use=no.such:Thing"], "no.such"),
    BadInput(
        "gold answer its verifier rejects",
        ["rewards.verifiers.correct={use: format, settings: {pattern: never}}"],
        "gold",
    ),
]


def bad_input() -> Row:
    """Each case through `hone train`, in a folder where a started run would leave traces."""
    failed: list[str] = []
    slowest_s = 0.0
    for case in BAD_INPUTS:
        with tempfile.TemporaryDirectory() as folder:
            run = run_timed([HONE, "train", QUICKSTART, *case.arguments], Path(folder), 60.0)
            lines = [line for line in run.output.splitlines() if line.startswith("error:")]
            is_plain = len(lines) == 1 and re.search(case.expected, lines[0])
            if run.code != 2 or not is_plain or (Path(folder) / "runs").exists():
                failed.append(case.name)
            slowest_s = max(slowest_s, run.total_s)
    measured = f"{len(BAD_INPUTS) - len(failed)} of {len(BAD_INPUTS)}, slowest {slowest_s:.1f} s"
    return judged(
        "bad input: one clear line, exit code 2, nothing started",
        measured, f"{len(BAD_INPUTS)} of {len(BAD_INPUTS)}", not failed, ", ".join(failed),
    )  # fmt: skip


def held_by_tests() -> Iterator[Row]:
    yield proven(
        "repo rules: import direction, file length, config budget, dead fields",
        ["tests/unit/test_repo_rules.py"],
        "all pass",
    )
    yield proven(
        "loss: packed = padded = reference loop, values and gradients in float64",
        [
            "tests/integration/test_learner.py::test_value_and_gradients_equal_the_reference_in_float64"
        ],
        "1e-6",
        {"max_abs_error": 1e-6},
    )
    yield proven(
        "2 learner ranks = 1 rank, weights after 3 steps",
        ["tests/integration/test_learner.py::test_two_ranks_equal_one"],
        "1e-5",
        {"max_abs_weight_difference": 1e-5},
    )
    yield proven(
        "a stale output head is caught by the probe; agreement after every other sync",
        ["tests/integration/test_weight_sync.py"],
        "probe error of a sound engine <= 1e-4",
        {"probe_error": MISMATCH},
    )
    yield proven(
        "replay buffer, real server: two learners, leases, duplicates, full, 10,000 groups",
        [f"tests/integration/test_replay_{name}.py" for name in BUFFER_TESTS],
        "nothing lost, nothing twice",
    )
    yield proven(
        "Ctrl-C: state saved, no process left; the run goes on at once; `hone eval` agrees with it",
        ["tests/e2e/test_train.py"],
        "15 s",
        {"seconds_to_exit": 15.0},
    )


def buffer_throughput(quick: bool) -> Row:
    result = measure(500 if quick else 2000)
    size = f"{result.num_groups} groups of {result.group_bytes / 1e3:.0f} kB"
    measured = "; ".join(
        f"{name} {row.groups_per_s:,.0f} groups/s, {row.mb_per_s:,.0f} MB/s"
        for name, row in (("add", result.add), ("claim and fetch", result.claim_fetch))
    )
    return Row(f"replay buffer throughput, {size}", measured, "printed", "holds")


def pretrained_policy(folder: Path) -> Row:
    run = run_timed([HONE, "train", SMOLLM2, "--run", "smollm2"], folder, 1200.0)
    if run.code != 0:
        return judged("SmolLM2-135M: 3 full steps", f"exit code {run.code}", "0", False, _tail(run))
    done = RunDir(folder / "runs" / "smollm2")
    metrics = [row for row in done.read_metrics() if row["step"] >= 1]
    losses = [row["loss/total"] for row in metrics if math.isfinite(row["loss/total"])]
    syncs = {e.fields["policy_version"] for e in done.read_events() if e.kind == "sync"}
    samples = [s for s in done.read_samples() if s.completion.strip()]
    has_samples = any(s.completion.strip()[:20] in done.report.read_text() for s in samples)
    mismatch = max(row["ratio/mismatch_abs_mean"] for row in metrics)
    right = sum(any(v.name == "correct" and v.score == 1.0 for v in s.verdicts) for s in samples)
    return judged(
        "SmolLM2-135M: 3 full steps, finite loss, real syncs, samples in the report",
        f"{len(losses)} finite losses, versions {sorted(syncs)} synced, mismatch {mismatch:.1e}, "
        f"{right} of {len(samples)} samples right, {run.total_s:.0f} s",
        f"3 losses, versions 0-3, mismatch <= {MISMATCH:g}",
        len(losses) == 3 and syncs == {0, 1, 2, 3} and has_samples and mismatch <= MISMATCH,
    )


def quickstart(clone: Path, seeds: list[int]) -> Iterator[Row]:
    """`make quickstart` in a fresh clone, set-up included for the first seed."""
    first_s: list[float] = []
    countdowns: list[list[str]] = []
    mismatches: list[float] = []
    for seed in seeds:
        run = run_timed(["make", "quickstart", f"SEED={seed}"], clone, 2 * QUICKSTART_S)
        first_s.append(run.first_s)
        countdowns.append(re.findall(r".* of about .*", run.output))
        if run.code != 0:
            yield judged(
                f"make quickstart, seed {seed}", f"exit code {run.code}", "0", False, _tail(run)
            )
            continue
        yield judged(
            f"make quickstart to its report, seed {seed}"
            + (", set-up of a fresh clone included" if seed == seeds[0] else ""),
            f"{run.total_s / 60:.1f} min",
            f"{QUICKSTART_S / 60:.0f} min",
            run.total_s <= QUICKSTART_S,
            f"load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores",
        )
        done = RunDir.open(parent=clone / "runs")
        metrics = done.read_metrics()
        accuracies = [row["eval/pass@1"] for row in metrics if "eval/pass@1" in row]
        gain = accuracies[-1] - accuracies[0]
        mismatches += [row["ratio/mismatch_abs_mean"] for row in metrics if row["step"] >= 1]
        is_reported = f"{accuracies[-1]:.3f}" in done.report.read_text()
        yield judged(
            f"held-out pass@1 over the warm-started policy, seed {seed}, in the report",
            f"{accuracies[0]:.3f} to {accuracies[-1]:.3f} ({gain:+.3f})",
            f"+{GAIN}",
            gain >= GAIN and is_reported,
        )
    num_countdowns = min(len(lines) for lines in countdowns)
    yield judged(
        f"first output on screen, and lines that say how long a stage takes, worst of {len(seeds)}",
        f"{max(first_s):.2f} s, {num_countdowns} lines",
        f"{FEEDBACK_S:.0f} s, one",
        max(first_s) <= FEEDBACK_S and num_countdowns > 0,
    )
    worst = max(mismatches, default=math.nan)
    yield judged(
        f"on-policy, float32: |rollout - learner| log-prob, worst of {len(mismatches)} steps",
        f"{worst:.1e}",
        f"{MISMATCH:g}",
        worst <= MISMATCH,
    )


def suite(clone: Path, quick: bool) -> Row:
    claim = "make test in a fresh clone"
    bound = f"green in {TEST_S / 60:.0f} min"
    if quick:
        return Row(claim, "not run", bound, "not shown here", "QUICK=1 leaves it out")
    run = run_timed(["make", "test"], clone, TEST_S)
    passed = re.findall(r"(\d+) passed", run.output)
    measured = f"exit code {run.code}, {passed[-1] if passed else 0} passed"
    measured += f", {run.total_s / 60:.1f} min"
    why = "" if run.code == 0 else _tail(run)
    return judged(claim, measured, bound, run.code == 0, why)


def _tail(run: Timed) -> str:
    return " / ".join(run.output.strip().splitlines()[-2:])[:200]
