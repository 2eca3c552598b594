"""Demonstrations of the reward layer: one row per claim, measured in this run.

`rows(quick=True)` times fewer runs and bombs, and leaves the swap test out, saying so.
"""

import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks import gold_answers, judge_outage, process_reward
from benchmarks.live_swaps import CRASHES, measure
from benchmarks.proofs import proven
from benchmarks.show import Part, Row, judged
from cluster.config import VerifierConfig
from cluster.types import Message, Task
from rewards.rubric import Rubric
from rewards.sandbox import TIERS, Sandbox, Tier, self_test
from rewards.self_check import group_of

TESTS = "tests/integration/test_"
BOMBS = (r"\boxed{9^{9^{9^N}}}", r"\boxed{(x+1)^{99N}}", r"\boxed{1000N!}",
         r"\boxed{" + "(" * 4000 + "N}", r"\boxed{\sqrt{x^{99}+\sin(Nx)^{98}}^{97}}")  # fmt: skip
SLOW = r"\boxed{(x+1)^{99}(x+2)^{99}(x+3)^{99}(x+N)^{99}}"  # reaches algebra, is killed there
KINDS = {  # kind: (reference, answer with N replaced by 0, 1, 2, ..., bound)
    "whole numbers": ("42", "N", 1000),
    "fractions": ("1/7", r"\frac{N}{7}", 1000),
    "sets and intervals": (r"\{1, 2, 3\}", r"\{N, 2, 3\}", 500),
    "polynomials, by algebra": ("x^2+1", "x^2+N+1", 30),
}
COLD = "print(1)"
RATES: dict[Tier, int] = {"namespaces": 120, "landlock": 95}  # runs/s of one slot

LIVE = f"{TESTS}reward_admin.py"
LONG = (
    ("20 swaps, promotes, rollbacks under load: no group lost, doubled or mixed; cut-over < 1 s",
     [LIVE, "-k", "under_load or live_benchmark"]),
    ("a candidate that fails or dies in any phase changes nothing",
     [LIVE, "-k", "bad_candidate or shadow"]),
    ("verifiers in pools of their own: bounds, queue, deaths, environments, swaps",
     [f"{TESTS}verifier_pool.py"]),
    ("the promoted rubric survives resume; the CLI changes a run of another process",
     [LIVE, "-k", "resumed or command_line"]),
)  # fmt: skip
SHORT = (
    ("sandbox: 25+ attacks contained in every tier, limits held, graders not fooled",
     [f"{TESTS}sandbox.py"]),
    ("math verifier: bombs, hangs, crashes, abstentions", [f"{TESTS}math_verifier.py"]),
    ("golden sets refuse a broken verifier at the start, at a swap and at a rollback",
     ["tests/unit/test_golden.py", LIVE, "-k", "golden"]),
    ("a verifier of under 30 lines from outside the repository, no core edit",
     ["tests/unit/test_readme_verifier.py"]),
    ("judge on a real HTTP server: 500s, rate limits, junk, timeouts, injections, costs, recovery",
     [f"{TESTS}judge.py"]),
    ("efficiency, language and trace rules: published values", ["tests/unit/test_trace_rules.py"]),
    ("step scores at token ends, on odd splits; exact steps; formats of public process models",
     ["tests/unit/test_steps.py", "tests/unit/test_arithmetic_steps.py",
      f"{TESTS}gym_steps.py", f"{TESTS}process_reward.py", f"{TESTS}process_training.py"]),
)  # fmt: skip


def rows(quick: bool) -> Iterator[Row | Part]:
    for claim, arguments in LONG:
        if quick:
            yield Row(claim, "-", "all tests", "not shown here", "takes minutes: leave QUICK out")
        else:
            yield proven(claim, arguments, "all tests")
    yield Part("20 changes of rewards in a training run", lambda: _live(quick))
    yield Part("judge served by vLLM", lambda: judge_outage.rows(quick))
    for claim, arguments in SHORT:
        yield proven(claim, arguments, "all tests")
    yield _pairs()
    yield Part("sandbox: runs per second", lambda: _sandbox(quick))
    yield Part("math verifier: bombs, rates", lambda: asyncio.run(_math(200 if quick else 1000)))
    yield Part("gold answers", lambda: gold_answers.rows(1 if quick else 3))
    yield Part("process model", lambda: _process_model(quick))
    yield Row(
        "code in other languages than Python is run and judged",
        "", "it is", "not shown here", "not there: the `code` verifier runs Python only",
    )  # fmt: skip


def _live(quick: bool) -> Iterator[Row]:
    """20 changes of rewards in a training run with engines, after a crash in each phase."""
    claim = (
        "20 swaps, rollbacks and promotes in a training run: no group lost, scored or trained on "
        "twice, or mixed"
    )
    waits = "learner wait in a step with a cut-over, beyond that of a step without"
    crashes = "in the same run: a candidate dies built, on gold, as a worker (twice), as a shadow"
    if quick:
        for one in (claim, waits, crashes):
            yield Row(one, "-", "all of it", "not shown here", "takes minutes: leave QUICK out")
        return
    run = measure(20, 600.0)
    num_changes = run.actions.total()
    dropped = ", ".join(f"{count} {why}" for why, count in sorted(run.dropped.items())) or "none"
    measured = (
        f"{', '.join(f'{n} {action}' for action, n in sorted(run.actions.items()))}; "
        f"{run.num_trained} groups trained on, {run.num_twice} twice; {run.num_scored} scored, "
        f"{run.num_scored_twice} twice; dropped: {dropped}; "
        f"{run.num_mixed} of {run.num_seen} stored ones mixed"
    )
    is_held = num_changes >= 20 and run.num_seen > 0 and run.num_scored > 0
    is_held &= not run.num_twice + run.num_scored_twice + run.num_mixed
    is_held &= not run.dropped and not run.faults
    bound = "20 changes; 0 twice, dropped or mixed; audit sound"
    yield judged(claim, measured, bound, is_held, "; ".join(run.faults)[:300])
    extra, cutovers = run.extra_waits_s or [math.inf], run.cutovers_s or [math.inf]
    measured = (
        f"median {statistics.median(extra):.2f} s, most {max(extra):.2f} s; "
        f"cut-over {1000 * max(cutovers):.1f} ms"
    )
    yield judged(waits, measured, "< 1 s", max(extra) < 1.0 and max(cutovers) < 1.0)
    measured = f"{run.num_unmoved} of {len(CRASHES)} left the live version and the run as they were"
    yield judged(crashes, measured, "all", run.num_unmoved == len(CRASHES))


def _pairs() -> Row:
    return proven(
        "math verifier: 400+ pairs, equal, unequal and adversarial, every policy flag",
        [f"{TESTS}math_pairs.py"], "all as the table says", {"pairs": 9999},
    )  # fmt: skip


def _process_model(quick: bool) -> Iterator[Row]:
    """A process model of a run's own rollouts on held-out traces, beside the stand-ins."""
    claim = "process model trained on a run's own Monte-Carlo labels: held-out step AUC"
    best = "its best-of-8 against the majority vote of the same 8"
    if quick:
        for one in (claim, best):
            yield Row(one, "-", "measured", "not shown here", "takes minutes: leave QUICK out")
        return
    with tempfile.TemporaryDirectory(prefix="hone-process-") as place:
        run, model = process_reward.make(Path(place))
        found = process_reward.measure(str(run), str(model))
    trained = found["trained"]
    others = ", ".join(
        f"{name} {found[name]['auc']:.2f}" for name in process_reward.STAND_INS if name in found
    )
    yield judged(
        claim,
        f"{trained['auc']:.3f} over {trained['steps']:.0f} steps, {trained['auc_first_error']:.3f} "
        f"up to the first wrong one ({others})",
        "> 0.8",
        trained["auc"] > 0.8,
    )
    yield judged(
        best,
        f"{trained['best_of_n']:.3f} against {found['majority']:.3f} (one sample "
        f"{found['one']:.3f}) on {found['tasks']} tasks",
        "higher",
        trained["best_of_n"] > found["majority"],
    )


def _sandbox(quick: bool) -> Iterator[Row]:
    """Batches in turn, each tier judged by the median of its batches."""
    num_batches, size = 20 if quick else 60, 10
    for tier in TIERS:
        claim = f"sandbox tier {tier}: runs per second in one slot, median of batches of ten"
        escapes = self_test(tier)
        if escapes:
            yield Row(claim, "-", "measured", "not shown here", "; ".join(escapes)[:200])
            continue
        sandbox = Sandbox(tier)
        sandbox.run("program", COLD)
        rates: list[float] = []
        is_right = True
        for _ in range(num_batches):
            started = time.perf_counter()
            results = [sandbox.run("program", COLD) for _ in range(size)]
            rates.append(size / (time.perf_counter() - started))
            is_right &= all(r.stdout == "1\n" for r in results)
        sandbox.close()
        colds: list[float] = []
        for _ in range(10):
            started = time.perf_counter()
            fresh = Sandbox(tier)
            fresh.run("program", COLD)
            colds.append(time.perf_counter() - started)
            fresh.close()
        rate = statistics.median(rates)
        measured = (
            f"{rate:.0f} (fastest {max(rates):.0f}); cold start "
            f"{1000 * statistics.median(colds):.0f} ms"
        )
        yield judged(claim, measured, f">= {RATES[tier]}", is_right and rate >= RATES[tier])


async def _math(num_bombs: int) -> list[Row]:
    """Latency of an honest symbolic check before and after bombs; checks per second of CPU."""
    rubric = Rubric({"correct": VerifierConfig(use="math", timeout_s=30)})

    async def honest() -> float:
        started = time.perf_counter()
        assert await _paid(rubric, "x^2+1", [r"\boxed{1+x^2}"]) == 1
        return time.perf_counter() - started

    try:
        await honest()
        before = statistics.median([await honest() for _ in range(9)])
        kinds = [SLOW if i % 50 == 49 else BOMBS[i % len(BOMBS)] for i in range(num_bombs)]
        bombs = [kind.replace("N", str(1000 + i)) for i, kind in enumerate(kinds)]
        started = time.perf_counter()
        rewards: list[float | None] = []
        for start in range(0, num_bombs, 50):
            rewards += await _rewards(rubric, "x^2+1", bombs[start : start + 50])
        bombs_s = time.perf_counter() - started
        first = await honest()
        after = statistics.median([await honest() for _ in range(9)])
        rates = {kind: await _rate(rubric, *KINDS[kind][:2]) for kind in KINDS}
    finally:
        await rubric.close()
    claim = (
        f"{num_bombs} different expression bombs: none is paid, and the next honest checks take at "
        "most 3 times as long as before, and 50 ms"
    )
    measured = (
        f"{1000 * before:.1f} ms before, {1000 * first:.1f} the first one after, "
        f"{1000 * after:.1f} the next ones ({bombs_s:.1f} s of bombs; "
        f"{rewards.count(0.0)} refused, {rewards.count(None)} killed at work)"
    )
    is_held = max(first, after) < 3 * before + 0.05 and not any(rewards)
    is_held &= rewards.count(None) == kinds.count(SLOW)
    return [
        judged(claim, measured, "both below 3x + 50 ms, none paid", is_held),
        *(
            judged(f"math checks per second of one core: {kind}", f"{rate:.0f}",
                   f">= {KINDS[kind][2]}", rate >= KINDS[kind][2])
            for kind, rate in rates.items()
        ),
    ]  # fmt: skip


async def _paid(rubric: Rubric, reference: str, texts: list[str]) -> int:
    return sum(bool(reward) for reward in await _rewards(rubric, reference, texts))


async def _rewards(rubric: Rubric, reference: str, texts: list[str]) -> list[float | None]:
    task = Task(task_id="t", taskset="x", reference=reference,
                messages=[Message(role="user", content="?")])  # fmt: skip
    return (await rubric.score(group_of(task, texts))).rewards


async def _rate(rubric: Rubric, reference: str, answer: str) -> float:
    """Different answers per second of CPU time (counted in 10 ms) of this process and workers."""
    count = 200 if "x" in reference else 4000
    answers = [rf"\boxed{{{answer.replace('N', str(i))}}}" for i in range(count)]
    await _paid(rubric, reference, answers[:2])
    started = _cpu_s()
    assert await _paid(rubric, reference, answers) <= 2
    return len(answers) / (_cpu_s() - started)


def _cpu_s() -> float:
    processes = [psutil.Process(), *psutil.Process().children()]
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)
