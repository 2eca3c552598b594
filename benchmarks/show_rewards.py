"""Demonstrations of the reward layer: one row per claim, measured in this run.

`rows(quick=True)` times fewer runs and bombs, and leaves the swap test out, saying so.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator

from benchmarks.proofs import proven
from benchmarks.show import Row
from cluster.config import VerifierConfig
from cluster.types import Message, Task
from rewards.rubric import Rubric
from rewards.sandbox import TIERS, Sandbox, self_test
from rewards.self_check import group_of

TESTS = "tests/integration/test_"
BOMBS = (r"\boxed{9^{9^{9^9}}}", r"\boxed{(x+1)^{99999}}", r"\boxed{10000000!}",
         r"\boxed{" + "(" * 4000 + "}", r"\boxed{\sqrt{x^{99}+\sin(x)^{98}}^{97}}")  # fmt: skip
COLD = "print(1)"


NOT_SHOWN = (
    ("20 changes during a training run at full speed", "learner wait < 1 s",
     "shown on reward actors and buffer without engines"),
    ("judge served by vLLM, down for 60 s during a run", "training goes on",
     "the protocol is tested against a server process, no training run with it yet"),
    ("process reward model: step AUC and best-of-8", "> 0.8", "not there yet"),
)  # fmt: skip
LIVE = f"{TESTS}reward_admin.py"
LONG = (
    ("20 swaps, promotes, rollbacks under load: no group lost, doubled or mixed; cut-over < 1 s",
     [LIVE, "-k", "twenty"]),
    ("a candidate that fails or dies in any phase changes nothing",
     [LIVE, "-k", "bad_candidate or shadow"]),
    ("the promoted rubric survives resume; the CLI changes a run of another process",
     [LIVE, "-k", "resumed or command_line"]),
)  # fmt: skip
SHORT = (
    ("sandbox: attacks contained in every tier, limits held, graders not fooled",
     [f"{TESTS}sandbox.py"]),
    ("math verifier: pairs, bombs, adversarial answers", [f"{TESTS}math_verifier.py"]),
    ("judge on a real HTTP server: 500s, rate limits, junk, timeouts, injections, recovery",
     [f"{TESTS}judge.py"]),
    ("efficiency, language and trace rules: published values", ["tests/unit/test_trace_rules.py"]),
)  # fmt: skip


def rows(quick: bool) -> Iterator[Row]:
    for claim, arguments in LONG:
        if quick:
            yield Row(claim, "-", "all tests", "not shown here", "takes minutes: leave QUICK out")
        else:
            yield proven(claim, arguments, "all tests")
    for claim, arguments in SHORT:
        yield proven(claim, arguments, "all tests")
    yield from _sandbox(quick)
    yield from asyncio.run(_math(200 if quick else 1000))
    for claim, bound, why in NOT_SHOWN:
        yield Row(claim, "-", bound, "not shown here", why)


def _sandbox(quick: bool) -> Iterator[Row]:
    count = 100 if quick else 500
    for tier in TIERS:
        claim = f"sandbox tier {tier}: runs per second in one slot, warm and cold"
        escapes = self_test(tier)
        if escapes:
            yield Row(claim, "-", "measured", "not shown here", "; ".join(escapes)[:200])
            continue
        sandbox = Sandbox(tier)
        sandbox.run("program", COLD)
        started = time.perf_counter()
        results = [sandbox.run("program", COLD) for _ in range(count)]
        warm = count / (time.perf_counter() - started)
        sandbox.close()
        colds: list[float] = []
        for _ in range(10):
            started = time.perf_counter()
            fresh = Sandbox(tier)
            fresh.run("program", COLD)
            colds.append(time.perf_counter() - started)
            fresh.close()
        cold = 1 / statistics.median(colds)
        is_held = all(r.stdout == "1\n" for r in results) and warm >= 95
        verdict = "holds" if is_held else "falls short"
        why = "" if is_held else "wall clock on a machine that may be shared"
        yield Row(claim, f"{warm:.0f} warm, {cold:.0f} cold",
                  ">= 95 warm", verdict, why)  # fmt: skip


async def _math(num_bombs: int) -> list[Row]:
    """Latency of an honest symbolic check before and after bombs; checks per second."""
    rubric = Rubric({"correct": VerifierConfig(use="math", timeout_s=30)})
    task = Task(task_id="t", taskset="x", reference="x^2+1",
                messages=[Message(role="user", content="?")])  # fmt: skip

    async def honest() -> float:
        started = time.perf_counter()
        scored = await rubric.score(group_of(task, [r"\boxed{1+x^2}"]))
        assert scored.rewards == [1.0]
        return time.perf_counter() - started

    try:
        await honest()
        before = statistics.median([await honest() for _ in range(9)])
        bombs = [BOMBS[i % len(BOMBS)] + " " * i for i in range(num_bombs)]
        started = time.perf_counter()
        paid = 0
        for start in range(0, num_bombs, 50):
            scored = await rubric.score(group_of(task, bombs[start : start + 50]))
            paid += sum(bool(r) for r in scored.rewards)
        bombs_s = time.perf_counter() - started
        after = statistics.median([await honest() for _ in range(9)])
        number = Task(task_id="n", taskset="x", reference="42", messages=task.messages)
        texts = [f"The answer is {i}." for i in range(500)]
        started = time.perf_counter()
        await rubric.score(group_of(number, texts))
        rate = len(texts) / (time.perf_counter() - started)
    finally:
        await rubric.close()
    is_held = after < 3 * before + 0.05 and paid == 0
    claim = f"{num_bombs} expression bombs leave the next honest check as fast as before"
    measured = f"{1000 * before:.1f} ms before, {1000 * after:.1f} after ({bombs_s:.1f} s of bombs)"
    return [
        Row(claim, measured, "within 3x + 50 ms, none paid", "holds" if is_held else "falls short"),
        Row("number checks per second on one core", f"{rate:.0f}", "> 1000",
            "holds" if rate > 1000 else "falls short"),
    ]  # fmt: skip
