"""`make show AREA=durability`: nothing lost, nothing twice, no bit of difference after kill -9."""

import math
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from benchmarks import replay_buffer, simulation, throughput, time_to_accuracy
from benchmarks.chaos import KINDS, PROCESSES, LiveRun, Recovery, RunEndedError, two_kinds
from benchmarks.proofs import proven
from benchmarks.show import Part, Row, judged

STEPS, QUICK_STEPS = 200, 100  # enough for each kind to be killed once
RATE_TIMES_STEPS = 8e-3  # learner.lr times the steps: enough to learn most, not all
PAUSE_S = (1.0, 4.0)  # between a recovery and the next kill
END_S = 3600.0
NOISE = 3.0  # standard errors
PAIR_SHARE, AGAIN_SHARE = 0.3, 0.2  # of the kills, once each kind had its turn
# The second dies while it comes up after the first.
AGAIN = [("controller", kind) for kind in ("learner", "rollout", "reward")] + [("learner",) * 2]
# Seconds until work goes on, of a tiny policy on CPU (docs/durability.md). What hangs is noticed
# when a call of it has had its time.
TARGETS_S = {
    "rollout": 15, "reward": 5, "learner": 20, "redis": 30, "controller": 30,
    "rollout_hang": 60, "reward_hang": 150, "learner_hang": 90, "redis_hang": 90,
    "controller_hang": 150,
}  # fmt: skip
FAULTS = "tests/e2e/test_faults.py"
BROADCAST = "tests/integration/test_weight_broadcast.py"


def rows(quick: bool) -> Iterator[Row | Part]:
    """Cheap rows first; QUICK shortens the chaos run and says so, and the simulated runs."""
    yield from held_by_tests()
    yield Part("the replay buffer", lambda: replay_buffer.rows(quick))
    yield Part("the simulator against runs", lambda: simulated(quick))
    yield Part("throughput", lambda: compared(quick))
    yield Part("time to the same held-out accuracy", lambda: learnt(quick))
    steps = QUICK_STEPS if quick else STEPS
    yield Part(
        f"kill -9 and SIGSTOP of random processes through {steps} steps", lambda: chaos(steps)
    )
    yield from not_shown()


def held_by_tests() -> Iterator[Row]:
    yield proven(
        "a controller that was presumed dead cannot write: buffer, ledger, checkpoints",
        ["tests/integration/test_fencing.py"],
        "all refused",
    )
    yield proven(
        "the audit names every kind of loss and double use; hone replay stats|show|why",
        ["tests/integration/test_reconcile.py"],
        "all pass",
    )
    yield proven(
        "checkpoint: written beside training, atomic at every system call, resumed on other ranks,"
        " torn or damaged ones passed over, a full disk fails the save and not the run",
        [
            "tests/unit/test_checkpoint_store.py",
            "tests/integration/test_learner_state.py",
            "tests/integration/test_learner.py",
            "tests/unit/test_supervisor.py",
        ],
        "all pass",
    )
    yield proven(
        "buffer: kill -9 of Redis and learners, lost replies, poison to the dead letters",
        [f"tests/integration/test_replay_{n}.py" for n in ("faults", "lost_replies", "model")],
        "nothing lost, nothing twice",
    )
    yield proven(
        "a group is taken in once; long rollouts are used as often as short ones, none is too old",
        ["tests/unit/test_intake.py", "tests/unit/test_curriculum.py"],
        "all pass",
    )
    yield proven(
        "replay policies fifo, freshest, prioritised: order, leases, age bound; two learners"
        " beside a producer, undone steps",
        ["tests/integration/test_replay_policies.py"],
        "nothing lost, nothing twice, nothing too old",
    )
    yield proven(
        "a prefix in an engine's cache is never read under other weights; without its salt it is",
        ["tests/integration/test_prefix_cache.py"],
        "log-probs within 1e-4 of those without a cache",
    )
    yield proven(
        "elastic: a rollout worker is added, proven by the probe, and removed while groups are"
        " sampled; what it gives back is sampled elsewhere",
        [
            "tests/integration/test_scaling.py",
            "tests/integration/test_gang.py",
            f"{BROADCAST}::test_a_worker_is_added_proven_and_removed_while_groups_are_sampled",
        ],
        "all pass",
    )
    yield proven(
        "a stall names its stage and dumps the stacks of every process",
        ["tests/unit/test_watchdog.py"],
        "all pass",
    )
    yield proven(
        "resume_is_exact: sync mode, kill -9 of the whole tree at a random point, --resume",
        [f"{FAULTS}::test_resumed_after_kill_9_of_everything_ends_with_the_same_bits"],
        "0 tensors differ in any bit (weights, optimizer, counters)",
        {"differing_tensors": 0.0},
    )
    yield proven(
        "sync mode: every kind of process dies, and hangs, one after the other: the same bits",
        [f"{FAULTS}::test_chaos_of_every_kind_of_process_ends_with_the_same_bits"],
        "0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    )
    yield proven(
        "rollouts ahead of the learner: every kind of process dies, and hangs, one after the other",
        [f"{FAULTS}::test_chaos_with_rollouts_ahead_of_the_learner_uses_each_group_once"],
        "each group used once or dropped with a reason, none too old",
    )
    yield proven(
        "all rollout workers die amid a weight sync: the step waits for a replacement",
        [
            "tests/integration/test_weight_sync.py"
            "::test_a_sync_in_which_every_worker_dies_waits_for_a_replacement"
        ],
        "the replacement holds the weights and agrees with the learner",
    )
    yield proven(
        "a Redis or an actor that hangs is told from one that is busy, killed, and comes back",
        [
            "tests/integration/test_keepers.py",
            "tests/integration/test_weight_sync.py"
            "::test_an_actor_that_hangs_is_replaced_though_nobody_asks_it_for_anything",
        ],
        "all pass",
    )
    yield proven(
        "a network to Redis that is slow, and cut time and again; a clock of Redis that jumps",
        [
            f"{FAULTS}::test_a_slow_network_that_is_cut_time_and_again_changes_no_bit",
            f"{FAULTS}::test_a_clock_of_redis_that_jumps_changes_no_bit",
        ],
        "0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    )
    yield proven(
        "a Redis that comes back without groups that it had taken in: noticed, sampled again",
        [f"{FAULTS}::test_groups_that_redis_has_forgotten_are_sampled_again"],
        "0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    )
    yield proven(
        "a Redis of one's own that is away for longer than one call may take",
        [f"{FAULTS}::test_a_run_outlasts_a_redis_that_is_away_for_longer_than_one_call"],
        "waited for; 0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    )


def simulated(quick: bool) -> Iterator[Row]:
    """Three runs that differ in policy age, against their simulations."""
    yield proven(
        "the simulator: closed forms; no group lost or too old; groups taken in as by a run",
        ["tests/unit/test_simulation.py"],
        "all pass",
    )
    with tempfile.TemporaryDirectory(prefix="hone-simulation-") as name:
        yield from simulation.rows(quick, Path(name))


def compared(quick: bool) -> Iterator[Row | Part]:
    """With TRL, and with the stages alone."""
    with tempfile.TemporaryDirectory(prefix="hone-throughput-") as name:
        yield from throughput.rows(quick, Path(name))


def learnt(quick: bool) -> Iterator[Row]:
    """With TRL, until both are as good."""
    with tempfile.TemporaryDirectory(prefix="hone-accuracy-") as name:
        yield from time_to_accuracy.rows(quick, Path(name))


def chaos(steps: int) -> Iterator[Row]:
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
            "finishes; ledger, buffer and checkpoints agree",
            audit.is_sound and audit.steps == steps and len(recoveries) > 0,
            "; ".join(audit.faults),
        )
        yield within_noise(calm, hurt)
        yield recovery_table(recoveries)


def kill_until_done(hurt: LiveRun, steps: int) -> list[Recovery]:
    """Every kind once in random order, then kills at random, some of two at once, some of one that
    comes up, until the end is near. A run that comes to its end before its last recovery was seen
    has none.
    """
    kinds = random.sample(KINDS, len(KINDS))
    recoveries: list[Recovery] = []
    with suppress(RunEndedError):
        while hurt.num_steps < steps - 5:
            time.sleep(random.uniform(*PAUSE_S))
            if kinds:
                recoveries.append(hurt.hurt(kinds.pop()))
            elif (share := random.random()) < PAIR_SHARE:
                recoveries.append(hurt.hurt(*two_kinds()))
            elif share < PAIR_SHARE + AGAIN_SHARE:
                first, second = random.choice(AGAIN)
                recoveries.append(hurt.hurt(first, then=second))
            else:
                recoveries.append(hurt.hurt(random.choice(PROCESSES)))
    return recoveries


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
    """Median seconds by kind: replaced, and working again, which the targets are of; of two the sum
    of theirs.
    """
    by_kind: dict[str, list[Recovery]] = {}
    for recovery in recoveries:
        by_kind.setdefault(recovery.kind, []).append(recovery)
    lines: list[str] = []
    late: list[str] = []
    for kind, found in sorted(by_kind.items()):
        replaced, working = (median(values) for values in zip(*[r[1:] for r in found], strict=True))
        lines.append(f"{kind} x{len(found)}: replaced {replaced:.1f} s, working {working:.1f} s")
        if working > sum(TARGETS_S[part] for part in re.split("[+>]", kind)):
            late.append(kind)
    targets = ", ".join(f"{kind} {seconds}" for kind, seconds in TARGETS_S.items())
    unkilled = sorted(set(KINDS) - by_kind.keys())
    return judged(
        "recovery, medians",
        "; ".join(lines),
        f"working within (s): {targets}",
        not late and not unkilled,
        f"late: {late}, never killed: {unkilled}" if late or unkilled else "",
    )


def not_shown() -> Iterator[Row]:
    yield Row(
        "2-hour soak: memory, keys, processes, files",
        "not run",
        "flat",
        "not shown here",
        "two hours: python -m benchmarks.soak --minutes 120 (last figures in docs/durability.md)",
    )
