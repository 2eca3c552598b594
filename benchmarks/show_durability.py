"""`make show AREA=durability`: nothing lost, nothing twice, no bit of difference after kill -9."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import recovery, replay_buffer, simulation, throughput, time_to_accuracy
from benchmarks.proofs import Claim, proven, proven_together
from benchmarks.show import Part, Row

STEPS, QUICK_STEPS = 200, 100  # enough for each kind to be killed once
FAULTS = "tests/e2e/test_faults.py"
BROADCAST = "tests/integration/test_weight_broadcast.py"
FAULT_CLAIMS = [  # most are of a run beside the same calm one
    Claim(
        "resume_is_exact: sync mode, kill -9 of the whole tree at a random point, --resume",
        [f"{FAULTS}::test_resumed_after_kill_9_of_everything_ends_with_the_same_bits"],
        "0 tensors differ in any bit (weights, optimizer, counters)",
        {"differing_tensors": 0.0},
    ),
    Claim(
        "sync mode: every kind of process dies, and hangs, one after the other: the same bits",
        [f"{FAULTS}::test_chaos_of_every_kind_of_process_ends_with_the_same_bits"],
        "0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    ),
    Claim(
        "rollouts ahead of the learner: every kind of process dies, and hangs, one after the other",
        [f"{FAULTS}::test_chaos_with_rollouts_ahead_of_the_learner_uses_each_group_once"],
        "each group used once or dropped with a reason, none too old",
    ),
    Claim(
        "a network to Redis that is slow, and cut time and again; a clock of Redis that jumps",
        [
            f"{FAULTS}::test_a_slow_network_that_is_cut_time_and_again_changes_no_bit",
            f"{FAULTS}::test_a_clock_of_redis_that_jumps_changes_no_bit",
        ],
        "0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    ),
    Claim(
        "a Redis that comes back without groups that it had taken in: noticed, sampled again",
        [f"{FAULTS}::test_groups_that_redis_has_forgotten_are_sampled_again"],
        "0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    ),
    Claim(
        "a Redis of one's own that is away for longer than one call may take",
        [f"{FAULTS}::test_a_run_outlasts_a_redis_that_is_away_for_longer_than_one_call"],
        "waited for; 0 tensors differ in any bit; the audit is sound",
        {"differing_tensors": 0.0},
    ),
]


def rows(quick: bool) -> Iterator[Row | Part]:
    """Cheap rows first; QUICK shortens the chaos run and says so, and the simulated runs."""
    yield from held_by_tests()
    yield Part("the replay buffer", lambda: replay_buffer.rows(quick))
    yield Part("the simulator against runs", lambda: simulated(quick))
    yield Part("throughput", lambda: compared(quick))
    yield Part("time to the same held-out accuracy", lambda: learnt(quick))
    steps = QUICK_STEPS if quick else STEPS
    yield Part(
        f"kill -9 and SIGSTOP of random processes through {steps} steps",
        lambda: recovery.rows(steps),
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
    yield from proven_together(FAULT_CLAIMS)


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


def not_shown() -> Iterator[Row]:
    yield Row(
        "2-hour soak: memory, keys, processes, files",
        "not run",
        "flat",
        "not shown here",
        "two hours: python -m benchmarks.soak --minutes 120 (last figures in docs/durability.md)",
    )
