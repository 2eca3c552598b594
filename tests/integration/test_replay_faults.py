"""The replay buffer when things break: learners, the server, bytes, memory."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import redis

from cluster import wire
from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import BufferFullError, BufferUnavailableError, WireError
from cluster.redis_client import connect, translated_errors
from cluster.replay_buffer import AddResult, ReplayBuffer
from cluster.replay_keys import Keys
from tests.replay_checker import (
    audit,
    claim,
    claim_and_die,
    fill,
    learn,
    make_buffer,
    make_group,
)

SPAWN = multiprocessing.get_context("spawn")


def test_expired_lease_returns_and_a_renewed_one_does_not(client: redis.Redis, run_id: str) -> None:
    buffer = make_buffer(client, run_id, lease_s=0.4)
    fill(buffer, "lost", "kept")
    assert claim(buffer, 1, owner="dead") == ["lost"]
    assert claim(buffer, 1, owner="alive") == ["kept"]
    for _ in range(3):
        time.sleep(0.2)
        assert buffer.renew("alive") == 1

    assert buffer.expire() == 1
    assert claim(buffer, owner="other") == ["lost"]
    assert buffer.release(["lost"], "dead") == 0
    audit(client, run_id, buffer)


def test_group_delivered_too_often_becomes_a_dead_letter(client: redis.Redis, run_id: str) -> None:
    buffer = make_buffer(client, run_id, lease_s=0.01)
    fill(buffer, "poison")
    for _ in range(2):
        assert claim(buffer) == ["poison"]
        time.sleep(0.03)
        assert buffer.expire() == 1
    assert claim(buffer) == ["poison"]
    time.sleep(0.03)

    assert buffer.expire() == 0
    [letter] = buffer.dead_letters(10)
    assert (letter.group_id, letter.reason) == ("poison", "delivered 3 times")
    assert letter.deliveries == 3
    assert abs(letter.died_at - time.time()) < 60
    audit(client, run_id, buffer)


def test_consume_takes_back_a_group_whose_lease_ran_out(client: redis.Redis, run_id: str) -> None:
    buffer = make_buffer(client, run_id, lease_s=0.01)
    fill(buffer, "a")
    claim(buffer)
    time.sleep(0.03)
    assert buffer.expire() == 1
    buffer.consume(["a"], step=1)

    assert claim(buffer) == []
    audit(client, run_id, buffer)


def test_killed_learner_loses_nothing(
    server: EmbeddedRedis, client: redis.Redis, run_id: str
) -> None:
    buffer = make_buffer(client, run_id, lease_s=0.3)
    fill(buffer, "a", "b", "c")
    learner = SPAWN.Process(target=claim_and_die, args=(server.url, run_id, 2, 0.3))
    learner.start()
    learner.join(timeout=30)
    assert learner.exitcode == -signal.SIGKILL
    assert buffer.stats().leased == 2

    time.sleep(0.35)
    assert buffer.expire() == 2
    assert claim(buffer) == ["a", "b", "c"]
    audit(client, run_id, buffer)


def test_ten_thousand_groups_pass_two_learners_once_each(
    server: EmbeddedRedis, client: redis.Redis, run_id: str
) -> None:
    """Four producers, each group sent twice, push against a small buffer; two processes learn."""
    num_groups = 10_000
    buffer = make_buffer(client, run_id, capacity=500)
    deadline = time.monotonic() + 120

    def produce(first: int) -> None:
        for i in range(first, num_groups, 4):
            group = make_group(f"g{i}", num_tokens=4)
            for expected in (AddResult.ADDED, AddResult.DUPLICATE):
                while time.monotonic() < deadline:
                    try:
                        assert buffer.add(group) is expected
                        break
                    except BufferFullError:
                        time.sleep(0.005)

    producers = [threading.Thread(target=produce, args=(i,)) for i in range(4)]
    with SPAWN.Pool(2) as pool:
        learners = [pool.apply_async(learn, (server.url, run_id, i)) for i in range(2)]
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join(timeout=130)
        consumed = [learner.get(timeout=60) for learner in learners]

    assert all(len(ids) > 0 for ids in consumed)
    everything = [group_id for ids in consumed for group_id in ids]
    assert sorted(everything) == sorted(f"g{i}" for i in range(num_groups))
    assert buffer.acknowledge(10**9) == num_groups
    stats = buffer.stats()
    assert (stats.added, stats.duplicates, stats.payload_bytes) == (num_groups, num_groups, 0)
    audit(client, run_id, buffer)


def test_server_killed_and_restarted_holds_every_group(tmp_path: Path, run_id: str) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        url = server.url
        client = connect(url)
        buffer = make_buffer(client, run_id, capacity=1000)
        fill(buffer, *(f"g{i}" for i in range(200)))
        claim(buffer, 100)
        buffer.consume([f"g{i}" for i in range(50)], step=1)
        before = buffer.stats()
        wait_until_written(client)

        os.kill(server.pid, signal.SIGKILL)
        adding = threading.Thread(target=fill, args=(buffer, "while-down"))
        adding.start()
        time.sleep(0.3)
        assert server.start() == url
        adding.join(timeout=20)

        after = buffer.stats()
        assert after.added == before.added + 1
        assert (after.leased, after.consumed) == (before.leased, before.consumed)
        assert buffer.add(make_group("g7")) is AddResult.DUPLICATE
        assert buffer.restore(0) == 100
        assert len(buffer.fetch(claim(buffer, 1000))) == 201
        audit(client, run_id, buffer)


def wait_until_written(client: redis.Redis) -> None:
    """Until the server has handed its AOF to the kernel, as it does before it replies."""
    deadline = time.monotonic() + 10
    while client.info("persistence")["aof_buffer_length"] and time.monotonic() < deadline:
        time.sleep(0.01)


def test_damaged_payloads_become_dead_letters(
    buffer: ReplayBuffer, client: redis.Redis, run_id: str
) -> None:
    fill(buffer, "flipped", "cut", "swapped", "missing", "good")
    payloads = Keys(run_id).payloads
    whole = client.hget(payloads, "flipped")
    assert isinstance(whole, bytes)
    damaged = {
        "flipped": whole[:50] + bytes([whole[50] ^ 1]) + whole[51:],
        "cut": whole[:3],
        "swapped": wire.encode(make_group("good")),
    }
    client.hset(payloads, mapping=damaged)
    client.hdel(payloads, "missing")
    claim(buffer)

    with pytest.raises(WireError) as error:
        buffer.fetch(["good", "flipped", "cut", "swapped", "missing", "stranger"])
    reasons = {
        "flipped": "checksum mismatch",
        "cut": "truncated: 3 bytes",
        "swapped": "payload is of group good",
        "missing": "no payload in the buffer",
    }
    for group_id, reason in {**reasons, "stranger": "no payload in the buffer"}.items():
        assert f"{group_id}: {reason}" in str(error.value)
    assert {d.group_id: d.reason for d in buffer.dead_letters(10)} == reasons
    assert {d.group_id: d.payload for d in buffer.dead_letters(10)} == {**damaged, "missing": b""}
    assert [d.group_id for d in buffer.dead_letters(1)] == ["missing"]
    letters = list(buffer.dead_letters_after("0-0"))
    assert letters == buffer.dead_letters(10)[::-1]
    assert list(buffer.dead_letters_after(letters[0].id)) == letters[1:]
    assert list(buffer.dead_letters_after(letters[-1].id)) == []
    assert [g.group_id for g in buffer.fetch(["good"])] == ["good"]


def test_the_last_ten_thousand_dead_letters_are_kept_and_read_a_few_at_a_time(
    client: redis.Redis, run_id: str
) -> None:
    """Redis trims by whole nodes of up to 100 entries."""
    key, buffer = Keys(run_id).dead, make_buffer(client, run_id)
    fields = {"group_id": "old", "reason": "torn", "deliveries": 1, "payload": b""}
    with client.pipeline(transaction=False) as pipeline:
        for _ in range(10_300):
            pipeline.xadd(key, fields)
        pipeline.execute()
    fill(buffer, "new")
    claim(buffer)
    client.hset(Keys(run_id).payloads, "new", b"rubbish")
    with pytest.raises(WireError):
        buffer.fetch(["new"])
    assert 10_000 <= client.xlen(key) < 10_200
    letters = list(buffer.dead_letters_after("0-0"))
    assert [letter.id.encode() for letter in letters] == [i for i, _ in client.xrange(key)]
    assert [letter.group_id for letter in letters[-2:]] == ["old", "new"]


def test_damaged_header_becomes_a_dead_letter(
    buffer: ReplayBuffer, client: redis.Redis, run_id: str
) -> None:
    fill(buffer, "bad", "good")
    client.hset(Keys(run_id).headers, "bad", b"\x01rubbish")

    assert claim(buffer) == ["good"]
    [letter] = buffer.dead_letters(10)
    assert letter.reason.startswith("header: checksum mismatch")


def test_server_out_of_memory_pushes_back_and_can_be_drained(
    buffer: ReplayBuffer, client: redis.Redis
) -> None:
    fill(buffer, "a", "b", "c")
    client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(BufferFullError, match="maxmemory"):
            buffer.add(make_group("d"))
        assert claim(buffer, 2) == ["a", "b"]
        buffer.consume(["a"], step=1)
        assert buffer.acknowledge(1) == 1
        buffer.drop("b", "x")
        buffer.drop("c", "x")
    finally:
        client.config_set("maxmemory", "0")
    fill(buffer, "d")


def test_server_that_stays_away_is_reported_in_time(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        buffer = make_buffer(connect(server.url, retry_s=0.5), "run")
        server.stop()
        started = time.monotonic()
        with pytest.raises(BufferUnavailableError, match=r"add: the server at buffer\.url"):
            buffer.add(make_group("a"))
        assert 0.2 < time.monotonic() - started < 5.0


def test_server_that_refuses_writes_for_a_while_is_waited_for(server: EmbeddedRedis) -> None:
    """As a replica does until it is promoted, and a server whose disk is full."""
    buffer = make_buffer(connect(server.url, retry_s=20.0), "refusing")
    admin = connect(server.url)
    fill(buffer, "a")
    admin.execute_command("REPLICAOF", "127.0.0.1", 1)
    promotion = threading.Timer(1.0, admin.execute_command, ("REPLICAOF", "NO", "ONE"))
    promotion.start()
    started = time.monotonic()
    fill(buffer, "b")
    assert time.monotonic() - started > 0.5
    promotion.join()
    assert claim(buffer) == ["a", "b"]
    audit(admin, "refusing", buffer)


def test_a_blocked_call_that_a_failover_throws_out_is_made_again(server: EmbeddedRedis) -> None:
    client, admin = connect(server.url, retry_s=20.0), connect(server.url)
    client.client_setname("waits")

    def throw_out() -> None:
        waiting = [c for c in admin.client_list() if c["name"] == "waits" and c["cmd"] == "blpop"]
        assert admin.execute_command("CLIENT", "UNBLOCK", waiting[0]["id"], "ERROR") == 1
        admin.rpush("list", "late")

    failover = threading.Timer(0.5, throw_out)
    failover.start()
    with translated_errors("wait"):
        assert client.blpop(["list"], timeout=10) == (b"list", b"late")
    failover.join()
    client.close()
    refusal = "NOREPLICAS Not enough good replicas to write."
    for text in (refusal, f"Command # 1 (EXPIRE key 1) of pipeline caused error: {refusal}"):
        with pytest.raises(BufferUnavailableError, match="replicas"), translated_errors("add"):
            raise redis.ResponseError(text)
