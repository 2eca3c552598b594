"""A run that is hurt from outside, started as a user does: it ends as if nothing had happened.

Sync mode on CPU in float32 is a function of the seed, so the proof is equality of bits: weights,
optimizer and counters of a run whose processes were killed equal those of one left alone.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.chaos import KINDS, LiveRun, differing

pytestmark = pytest.mark.slow  # `make show AREA=durability` runs them
STEPS = 40
OPTIONS = [
    f"run.steps={STEPS}", "run.checkpoint_every=4", "rollout.timeout_s=45", "sync.timeout_s=45",
]  # fmt: skip
END_S = 300.0
Record = Callable[[str, float], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def calm(folder: Path) -> LiveRun:
    run = LiveRun(folder, "calm", OPTIONS)
    run.start()
    assert run.finish(END_S) == 0, run.tail()
    return run


@pytest.fixture
def hurt(folder: Path, request: pytest.FixtureRequest) -> Iterator[LiveRun]:
    run = LiveRun(folder, request.node.name.split("_")[1], OPTIONS)
    run.start()
    yield run
    run.kill_everything()


def assert_as_if_nothing_happened(calm: LiveRun, hurt: LiveRun, record: Record) -> None:
    assert not hurt.leftovers()
    audit = hurt.reconcile()
    assert audit.is_sound, audit.faults
    assert audit.steps == STEPS
    differences = differing(calm.run, hurt.run)
    record("differing_tensors", len(differences))
    assert not differences
    rewards = [run.mean_reward(1, STEPS) for run in (calm, hurt)]
    record("reward_difference", abs(rewards[0] - rewards[1]))
    assert rewards[0] == pytest.approx(rewards[1], abs=0.05)


@pytest.mark.timeout(1200)
def test_resumed_after_kill_9_of_everything_ends_with_the_same_bits(
    calm: LiveRun, hurt: LiveRun, record_property: Record
) -> None:
    hurt.wait_for_steps(random.randint(2, STEPS // 2))
    time.sleep(random.random())
    hurt.kill_everything()
    hurt.start("--resume")
    assert hurt.finish(END_S) == 0, hurt.tail()
    assert_as_if_nothing_happened(calm, hurt, record_property)


@pytest.mark.timeout(1800)
def test_chaos_of_every_kind_of_process_ends_with_the_same_bits(
    calm: LiveRun, hurt: LiveRun, record_property: Record
) -> None:
    hurt.wait_for_steps(1)
    hurt.fill_disk()
    for kind in random.sample(KINDS, len(KINDS)):
        recovery = hurt.hurt(kind)
        record_property(f"{kind}_replaced_s", recovery.replaced_s)
        record_property(f"{kind}_working_s", recovery.working_s)
    assert hurt.finish(END_S) == 0, hurt.tail()
    kinds = [event.kind for event in hurt.run.read_events()]
    assert kinds.count("worker_died") >= 5, "all but Redis are actors"
    assert_as_if_nothing_happened(calm, hurt, record_property)
