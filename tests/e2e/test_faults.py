"""A run that is hurt from outside, started as a user does: it ends as if nothing had happened.

Sync mode on CPU in float32 is a function of the seed, so the proof is equality of bits: weights,
optimizer and counters of a run whose processes were killed equal those of one left alone.
"""

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.chaos import KINDS, LiveRun
from benchmarks.proofs import ROOT
from benchmarks.relay import Relay
from benchmarks.same_bits import differing
from cluster.embedded_redis import EmbeddedRedis
from cluster.reconcile import reconcile
from cluster.redis_client import CALL_S, URL_VARIABLE, connect
from cluster.replay_keys import Keys
from cluster.replay_reader import BufferReader

pytestmark = pytest.mark.slow  # `make show AREA=durability` runs them
STEPS = 60
MAX_POLICY_AGE = 2
OPTIONS = [
    f"run.steps={STEPS}", "run.checkpoint_every=4", "rollout.timeout_s=45", "sync.timeout_s=45",
    "learner.timeout_s=60", "eval.every=8", "rollout.program.use=prefix",
    "rollout.program.settings.tokens=4",
]  # fmt: skip
END_S = 300.0
DELAY_S, CUT_S, NUM_CUTS = 0.02, 20.0, 6
JUMPED_S = 2.5  # until a written jump is seen
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
    assert kinds.count("worker_died") >= 8, "all but Redis are actors"
    assert_as_if_nothing_happened(calm, hurt, record_property)


@pytest.mark.timeout(1800)
def test_chaos_with_rollouts_ahead_of_the_learner_uses_each_group_once(
    folder: Path, record_property: Record
) -> None:
    """No two such runs are equal, so the books are the proof: all groups and their ages."""
    options = [*OPTIONS, f"run.steps={3 * STEPS}", f"rollout.max_policy_age={MAX_POLICY_AGE}"]
    run = LiveRun(folder, "ahead", options)
    run.start()
    try:
        run.wait_for_steps(1)
        harms = [(kind, "") for kind in KINDS]
        second = random.choice(["learner", "rollout", "reward"])  # dies as it comes up
        harms.append(("controller", second))
        for kind, then in random.sample(harms, len(harms)):
            recovery = run.hurt(kind, then=then)
            record_property(f"{recovery.kind}_working_s", recovery.working_s)
        assert run.finish(END_S) == 0, run.tail()
        assert not run.leftovers()
        audit = run.reconcile()
        assert audit.is_sound, audit.faults
        assert audit.steps == 3 * STEPS
        record_property("dropped", sum(audit.dropped.values()))
        ages = [row["policy_age/max"] for row in run.run.read_metrics() if "policy_age/max" in row]
        assert 0 < max(ages) <= MAX_POLICY_AGE
    finally:
        run.kill_everything()


@contextmanager
def shared_run(folder: Path, name: str, url: str) -> Iterator[LiveRun]:
    """On a Redis that nobody but the test starts, stops or disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(URL_VARIABLE, url)
        run = LiveRun(folder, name, OPTIONS)
        run.start()
    try:
        yield run
    finally:
        run.kill_everything()


def assert_same_bits(calm: LiveRun, run: LiveRun, url: str, record: Record) -> None:
    """As if nothing had happened; `url` leads to the run's buffer."""
    audit = reconcile(run.run, BufferReader(connect(url), run.run.buffer_id))
    assert audit.is_sound, audit.faults
    assert audit.steps == STEPS
    differences = differing(calm.run, run.run)
    record("differing_tensors", len(differences))
    assert not differences


@pytest.mark.timeout(1200)
def test_a_run_outlasts_a_redis_that_is_away_for_longer_than_one_call(
    calm: LiveRun, folder: Path, record_property: Record
) -> None:
    with (
        EmbeddedRedis(folder / "shared") as server,
        shared_run(folder, "outage", server.url) as run,
    ):
        run.wait_for_steps(5)
        server.stop()
        time.sleep(CALL_S + 15)
        run.check()
        server.start()
        assert run.finish(END_S) == 0, run.tail()
        kinds = [event.kind for event in run.run.read_events()]
        assert {"redis_lost", "redis_back"} <= set(kinds)
        assert run.run.buffer_id.startswith("outage-")
        assert_same_bits(calm, run, server.url, record_property)
        assert connect(server.url).ttl(Keys(run.run.buffer_id).epoch) > 0, "the run is done"


FORGET = """
local ready, leased, entries, headers, payloads, counters = unpack(KEYS)
local id = redis.call('ZRANGE', leased, 0, 0)[1]
id = id or string.sub(redis.call('ZRANGE', ready, 0, 0)[1] or '', 17)
if id == '' then return '' end
local entry = cmsgpack.unpack(redis.call('HGET', entries, id))
redis.call('ZREM', ready, entry.place)
redis.call('ZREM', leased, id)
for _, hash in ipairs({entries, headers, payloads}) do redis.call('HDEL', hash, id) end
redis.call('HINCRBY', counters, 'added', -1)
redis.call('HINCRBY', counters, 'payload_bytes', -entry.size)
return id
"""


@pytest.mark.timeout(1200)
def test_groups_that_redis_has_forgotten_are_sampled_again(
    calm: LiveRun, folder: Path, record_property: Record
) -> None:
    """As by one that comes back without its last second; the run lives on, and ends the same."""
    with (
        EmbeddedRedis(folder / "forgetful") as server,
        shared_run(folder, "forgotten", server.url) as run,
    ):
        client = connect(server.url)
        for step in (5, 25):
            run.wait_for_steps(step)
            keys = Keys(run.run.buffer_id)
            names = keys.ready, keys.leased, keys.entries, keys.headers, keys.payloads
            deadline = time.monotonic() + 60
            while not client.eval(FORGET, 6, *names, keys.counters):
                assert time.monotonic() < deadline
                time.sleep(0.002)
        assert run.finish(END_S) == 0, run.tail()
        kinds = [event.kind for event in run.run.read_events()]
        assert kinds.count("groups_vanished") == 2
        assert_same_bits(calm, run, server.url, record_property)


@pytest.mark.timeout(1200)
def test_a_slow_network_that_is_cut_time_and_again_changes_no_bit(
    calm: LiveRun, folder: Path, record_property: Record
) -> None:
    """Between the processes of a run and Redis, each way of each call."""
    with EmbeddedRedis(folder / "far") as server:
        relay = Relay(urlsplit(server.url).port or 0)
        url = server.url.replace(f":{urlsplit(server.url).port}/", f":{relay.port}/")
        with shared_run(folder, "network", url) as run:
            run.wait_for_steps(2)
            relay.delay_s = DELAY_S
            for _ in range(NUM_CUTS):
                run.wait_for_steps(run.num_steps + 5)
                relay.shut()
                time.sleep(random.uniform(1.0, CUT_S))
                relay.open()
            assert run.finish(END_S) == 0, run.tail()
            assert_same_bits(calm, run, server.url, record_property)


@pytest.mark.timeout(1200)
def test_a_clock_of_redis_that_jumps_changes_no_bit(
    calm: LiveRun, folder: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """Leases, life signs and deadlines of requests are on that clock."""
    offset = folder / "offset"
    offset.write_text("+0")
    with monkeypatch.context() as patch:
        for variable, value in (("TIMESTAMP_FILE", str(offset)), ("CACHE_DURATION", "1")):
            patch.setenv(f"FAKETIME_{variable}", value)
        patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        patch.setenv("LD_PRELOAD", str(fake_time()))
        server = EmbeddedRedis(folder / "jumping")
        server.start()
    pid = server.pid
    try:
        with shared_run(folder, "clock", server.url) as run:
            for jump_s in (86400, -7200, 0):
                run.wait_for_steps(run.num_steps + STEPS // 5)
                offset.write_text(f"{jump_s:+d}")
                time.sleep(JUMPED_S)
                skew_s = connect(server.url).time()[0] - time.time()
                assert abs(skew_s - jump_s) < 2 * JUMPED_S
            assert run.finish(END_S) == 0, run.tail()
            assert_same_bits(calm, run, server.url, record_property)
    finally:
        server.stop()
        for path in Path("/dev/shm").glob(f"*faketime*_{pid}"):
            path.unlink()


def fake_time() -> Path:
    """The library that gives the processes it is loaded into a clock of their own."""
    done = subprocess.run(
        [ROOT / "scripts" / "debian", "libfaketime", "./usr/lib"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(done.stderr.strip())
    return next(Path(done.stdout.strip()).rglob("libfaketime.so.1"))
