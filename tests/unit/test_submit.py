"""`hone submit` against a head that is still starting, one that refuses, and one without a lock."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from actors.train import CLUSTER_STOP_S
from cluster.errors import ConfigError, StageError
from serve import submit

ROOT = Path(__file__).parents[2]


class Head(ThreadingHTTPServer):
    """The part of a dashboard's HTTP API that a submission meets, with faults."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.num_failures = 0  # requests that still get 500
        self.forgets_to_answer = False  # the job is taken, but the answer is lost once
        self.refusal = 0  # status of every request with a token
        self.is_locked = True
        self.status = "RUNNING"  # of the job, until it is asked `num_polls` times
        self.num_polls = 3
        self.is_mute = False  # nothing comes of the job's output, not even an end
        self.is_closed = threading.Event()
        self.rest_s = 0.0  # before it reads what is sent to it
        self.jobs: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Head

    def do_GET(self) -> None:
        if self.path == "/api/version" and not self._fails():
            self._send(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})
        elif self.path.endswith("/logs/tail") and self.server.is_mute:
            self.server.is_closed.wait(60)
        elif self.path.endswith("/logs/tail"):
            self._send(500, {"error": "the stream broke"})
        elif self.path.startswith("/api/jobs/hone-"):
            self._tell_status()
        elif self.path == "/api/jobs/":
            self._send(401 if self.server.is_locked else 200, {})
        elif self.path.startswith("/api/packages"):
            self._send(404, {})

    def do_PUT(self) -> None:
        time.sleep(self.server.rest_s)
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._fails():
            return
        if body["submission_id"] in [job["submission_id"] for job in self.server.jobs]:
            self._send(500, {"error": f"Job {body['submission_id']} already exists."})
            return
        self.server.jobs.append(body)
        if self.server.forgets_to_answer:
            self._send(500, {"error": "the agent is not ready"})
        else:
            self._send(200, {"job_id": "x", "submission_id": body["submission_id"]})

    def log_message(self, *_: object) -> None: ...

    def _tell_status(self) -> None:
        """RUNNING, then an error, then what the job came to."""
        self.server.num_polls -= 1
        if self.server.num_polls == 1:
            self._send(500, {"error": "no answer in time"})
            return
        status = self.server.status if self.server.num_polls <= 0 else "RUNNING"
        identity = self.path.rpartition("/")[2]
        job = {"type": "SUBMISSION", "submission_id": identity, "status": status}
        self._send(200, job | {"entrypoint": "python"})

    def _fails(self) -> bool:
        if self.server.refusal:
            self._send(self.server.refusal, {"error": "no"})
            return True
        self.server.num_failures -= 1
        if self.server.num_failures >= 0:
            self._send(500, {"error": "no agent yet"})
            return True
        return False

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    shutil.copy(ROOT / "deploy" / "configs" / "quickstart.yaml", tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "PAUSE_S", 0.05)
    monkeypatch.setattr(submit, "START_S", 10.0)
    server = Head()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.is_closed.set()
    server.shutdown()


def send(head: Head) -> submit.Submission:
    return submit.submit(
        Path("run.yaml"), ["run.dir=/runs"], address=head.url, run="first", resume=True
    )


def test_the_job_is_the_same_command_with_the_current_directory(head: Head) -> None:
    job = send(head)
    [body] = head.jobs
    assert body["submission_id"] == job.submission_id
    assert body["submission_id"].startswith("hone-first-")
    assert body["entrypoint"] == (
        "python -m serve.cli train run.yaml run.dir=/runs --address auto --run first --resume"
    )
    assert body["runtime_env"]["working_dir"].startswith("gcs://")
    assert body["metadata"]["hone_run"] == "first"
    wait_s = int(body["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert wait_s > CLUSTER_STOP_S, "a run that is stopped has the time to save its state"


@pytest.mark.parametrize("num_failures", [1, 2, 5])
def test_a_head_that_is_starting_is_asked_again(head: Head, num_failures: int) -> None:
    head.num_failures = num_failures
    send(head)
    assert len(head.jobs) == 1


def test_a_lost_answer_does_not_start_the_run_twice(head: Head) -> None:
    head.forgets_to_answer = True
    send(head)
    assert len(head.jobs) == 1


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("STOPPED", 130)])
def test_a_job_is_followed_to_its_end_whatever_becomes_of_the_stream(
    head: Head, status: str, code: int
) -> None:
    head.status = status
    assert submit.follow(send(head)) == code
    assert head.num_polls <= 0


def test_a_head_that_no_longer_answers_is_given_up(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = send(head)
    monkeypatch.setattr(submit, "START_S", 0.2)
    head.shutdown()
    head.server_close()
    with pytest.raises(StageError, match="nobody says how it is"):
        submit.follow(job)


@pytest.mark.parametrize("num_polls", [0, 3])
def test_a_stream_without_an_end_is_left_when_the_job_is_over_or_nobody_knows(
    head: Head, monkeypatch: pytest.MonkeyPatch, num_polls: int
) -> None:
    monkeypatch.setattr(submit, "SILENCE_S", 0.1)
    head.is_mute, head.num_polls, head.status = True, num_polls, "SUCCEEDED"
    assert submit.follow(send(head)) == 0


def test_a_port_that_accepts_and_says_nothing_is_given_up(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = send(head)
    for name, limit in (("START_S", 0.2), ("SILENCE_S", 0.1), ("REQUEST_S", (0.2, 0.2))):
        monkeypatch.setattr(submit, name, limit)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match="timed out"):
            submit.submit(Path("run.yaml"), ["run.dir=/runs"], address=url, run="a", resume=False)
        job.client._address = url
        with pytest.raises(StageError, match="nobody says how it is"):
            submit.follow(job)


def test_a_directory_that_travels_slowly_arrives(
    head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sending may take longer than a connection, which keeps its own limit."""
    monkeypatch.setattr(submit, "REQUEST_S", (0.3, 10.0))
    monkeypatch.setattr(submit, "START_S", 0.0)
    (tmp_path / "data.bin").write_bytes(os.urandom(32 << 20))  # more than the kernel keeps
    head.rest_s = 1.0
    send(head)
    assert len(head.jobs) == 1


def test_a_wrong_token_is_refused_at_once(head: Head) -> None:
    head.refusal = 403
    with pytest.raises(ConfigError, match="--address"):
        send(head)
    assert not head.jobs


def test_nothing_is_sent_to_a_cluster_without_a_lock(head: Head) -> None:
    head.is_locked = False
    with pytest.raises(ConfigError, match="answers without a token"):
        send(head)
    assert not head.jobs


def test_an_address_that_is_no_dashboard_is_explained() -> None:
    with pytest.raises(ConfigError, match="must be the head's dashboard"):
        submit._client("127.0.0.1:6379")
