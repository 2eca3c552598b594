"""How a run fares whose processes are killed or stopped at random: does it end as a calm one does,
and how long until it works again, by kind of process?

`benchmarks.chaos` does the harm; `make show AREA=durability` prints these rows.
"""

import math
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from benchmarks.chaos import KINDS, POLL_S, LiveRun, Recovery, RunEndedError, two_kinds
from benchmarks.show import Row, judged

RATE_TIMES_STEPS = 8e-3  # learner.lr times the steps: enough to learn most, not all
PAUSE_S, PAUSE_STEPS = (1.0, 4.0), 4  # between a recovery and the next kill, at most
END_S = 3600.0
NOISE = 3.0  # standard errors
PAIR_SHARE, AGAIN_SHARE = 0.3, 0.2  # of the kills, once each kind had its turn
TWO_AT_ONCE, COMING_UP = "two at once", "one that comes up"
# The second dies while it comes up after the first.
AGAIN = [("controller", kind) for kind in ("learner", "rollout", "reward")] + [("learner",) * 2]
# Seconds until work goes on and who was lost is replaced, of a tiny policy on CPU
# (docs/durability.md). What hangs is noticed when a call of it has had its time.
TARGETS_S = {
    "rollout": 15, "reward": 5, "learner": 20, "redis": 30, "controller": 30,
    "rollout_hang": 60, "reward_hang": 150, "learner_hang": 90, "redis_hang": 90,
    "controller_hang": 150,
}  # fmt: skip


def rows(steps: int) -> Iterator[Row]:
    """A random process dies or hangs again and again, rollouts one step ahead of the learner."""
    options = [
        f"run.steps={steps}", "run.checkpoint_every=5", "rollout.max_policy_age=1",
        "buffer.max_deliveries=100", "rollout.timeout_s=30", "sync.timeout_s=30",
        "learner.timeout_s=60", f"learner.lr={RATE_TIMES_STEPS / steps:.1e}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hone-chaos-") as name:
        folder = Path(name)
        calm, hurt = (LiveRun(folder, kind, options) for kind in ("calm", "hurt"))
        try:
            calm.start()
            calm_code = calm.finish(END_S)
            hurt.start()
            hurt.wait_for_steps(1)
            recoveries = kill_until_done(hurt, steps)
            code = hurt.finish(END_S)
        finally:
            calm.kill_everything()
            hurt.kill_everything()
        if calm_code or code:
            yield judged("chaos", f"exit codes {calm_code} and {code}", "0", False, hurt.tail())
            return
        audit = hurt.reconcile()
        dropped = ", ".join(f"{n} {why}" for why, n in sorted(audit.dropped.items())) or "none"
        yield judged(
            "a random process is killed or stopped, some while it is being replaced, a few seconds "
            f"after the run works again, through {steps} steps; " + ", ".join(options[1:]),
            f"{len(recoveries)} times, {audit.steps} steps; {audit.num_sampled} groups sampled, "
            f"{audit.num_used} used once, {audit.num_waiting} waiting, dropped: {dropped}",
            f"each kind at least once, {TWO_AT_ONCE}, {COMING_UP}; finishes; ledger, buffer and "
            "checkpoints agree",
            audit.is_sound and audit.steps == steps and not missing(recoveries),
            "; ".join([*audit.faults, *(f"never hurt: {kind}" for kind in missing(recoveries))]),
        )
        yield within_noise(calm, hurt)
        yield recovery_table(recoveries)


def kill_until_done(hurt: LiveRun, steps: int) -> list[Recovery]:
    """Every kind once in random order, two at once, and one of each process that comes up, then one
    of those that were hurt least, or two at once, or one that comes up, until the end is near. A
    run that comes to its end before its last recovery was seen has none.
    """
    recoveries: list[Recovery] = []
    with suppress(RunEndedError):
        while hurt.num_steps < steps - 5:
            _pause(hurt)
            kinds, then = next_harm(recoveries)
            recoveries.append(hurt.hurt(*kinds, then=then))
    return recoveries


def next_harm(recoveries: Sequence[Recovery]) -> tuple[tuple[str, ...], str]:
    """Which kinds at once, and which as it comes up."""
    known = {recovery.kind for recovery in recoveries}
    share = random.random()
    alone = (random.choice(least_hurt(recoveries)),)
    if not known.issuperset(KINDS):
        return alone, ""
    if TWO_AT_ONCE in missing(recoveries) or share < PAIR_SHARE:
        return two_kinds(), ""
    left = [(first, second) for first, second in AGAIN if f"{first}>{second}" not in known]
    if left or share < PAIR_SHARE + AGAIN_SHARE:
        first, second = random.choice(left or AGAIN)
        return (first,), second
    return alone, ""


def missing(recoveries: Sequence[Recovery]) -> list[str]:
    """Kinds that were never hurt by themselves, and what else each run has to go through."""
    kinds = {recovery.kind for recovery in recoveries}
    left = sorted(set(KINDS) - kinds)
    left += [] if any("+" in kind for kind in kinds) else [TWO_AT_ONCE]
    return left + ([] if any(">" in kind for kind in kinds) else [COMING_UP])


def least_hurt(recoveries: Sequence[Recovery]) -> list[str]:
    """Kinds that were hurt by themselves as seldom as any."""
    times = Counter(recovery.kind for recovery in recoveries)
    fewest = min(times[kind] for kind in KINDS)
    return [kind for kind in KINDS if times[kind] == fewest]


def _pause(hurt: LiveRun) -> None:
    """Not for long where steps are fast, or there would be none left for the last kinds."""
    ends_at = time.monotonic() + random.uniform(*PAUSE_S)
    last = hurt.num_steps + PAUSE_STEPS
    while time.monotonic() < ends_at and hurt.num_steps < last:
        time.sleep(POLL_S)


def within_noise(calm: LiveRun, hurt: LiveRun) -> Row:
    """Mean rewards of the last quarter, each step one observation. The calm run must have learned
    more than noise, or an equal reward shows nothing; two runs of one pace differ a little, too.
    """
    curves = [
        [row["reward/mean"] for row in run.run.read_metrics() if "reward/mean" in row]
        for run in (calm, hurt)
    ]
    ends = [curve[-(len(curve) // 4) :] for curve in curves]
    error = math.sqrt(sum(_noise(end) ** 2 / len(end) for end in ends))
    first, last, hurt_last = (fmean(part) for part in (curves[0][: len(ends[0])], *ends))
    gain, difference = last - first, abs(last - hurt_last)
    return judged(
        "the reward curve is that of the calm run",
        f"first and last quarter {first:.3f}, {last:.3f} calm; last {hurt_last:.3f} hurt",
        f"last quarters within {NOISE:g} standard errors ({error:.3f} each), or a tenth of what "
        "the calm run gained, which is at least three times the former",
        gain >= 3 * NOISE * error and difference <= max(NOISE * error, gain / 10),
    )


def _noise(curve: Sequence[float]) -> float:
    """Standard deviation of a step beside what changes slowly."""
    return math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(curve)) / 2)


def recovery_table(recoveries: list[Recovery]) -> Row:
    """Median seconds by kind: replaced, and working again. The targets are of the later one; of two
    the sum of theirs.
    """
    by_kind: dict[str, list[Recovery]] = {}
    for recovery in recoveries:
        by_kind.setdefault(recovery.kind, []).append(recovery)
    lines: list[str] = []
    late: list[str] = []
    for kind, found in sorted(by_kind.items()):
        replaced, working = (median(values) for values in zip(*[r[1:] for r in found], strict=True))
        lines.append(f"{kind} x{len(found)}: replaced {replaced:.1f} s, working {working:.1f} s")
        target_s = sum(TARGETS_S[part] for part in re.split("[+>]", kind))
        if median(recovery.whole_s for recovery in found) > target_s:
            late.append(kind)
    targets = ", ".join(f"{kind} {seconds}" for kind, seconds in TARGETS_S.items())
    never = missing(recoveries)
    return judged(
        "recovery, medians",
        "; ".join(lines),
        f"replaced and working within (s): {targets}",
        not late and not never,
        f"late: {late}, never hurt: {never}" if late or never else "",
    )
