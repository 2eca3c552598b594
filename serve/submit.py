"""`hone submit`: the same training run as a job of a running Ray cluster.

Invariant: a request that is tried again cannot start the run twice, because the submission id is
chosen here, once. No wait for a head that accepts and says nothing is without end. What travels is
the current directory (code, config, data); packages come with the cluster's image and are compared
with the lock file when the job starts.
"""

import asyncio
import logging
import os
import secrets
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import config_file, ray_token
from cluster.errors import ConfigError, StageError

START_S = 60.0  # how long a head that has just started may answer with errors
PAUSE_S = 1.0
REQUEST_S = (5.0, 60.0)  # to connect, and for an answer
# The first is also the limit of sending: urllib3 keeps it on the socket until the body has gone.
UPLOAD_S = (600.0, 60.0)
SILENCE_S = 30.0  # of the output, after which the head is asked whether the job still runs
CLOSE_S = 5.0
# Read where the job's supervisor runs, which gets the job's environment. Ray's own 3 s would kill
# a run that is saving its state.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
logger = logging.getLogger(__name__)
EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}


@dataclass(frozen=True)
class Submission:
    """A run that was handed over, and where."""

    address: str
    submission_id: str
    client: Any

    @property
    def stop_command(self) -> str:
        return f"ray job stop --address {self.address} {self.submission_id}"


def submit(
    config: Path, overrides: list[str], *, address: str, run: str | None, resume: bool
) -> Submission:
    """Hand `config` over to the cluster whose dashboard is at `address` (http://HOST:PORT).

    Raises `ConfigError` for a config that cannot travel and for a cluster that refuses or does not
    answer within `START_S`.
    """
    arguments = _arguments(config, overrides, run, resume)
    ray_token.ensure(may_create=False)
    from ray.exceptions import AuthenticationError  # takes a second: what is above comes first

    name = run or config_file.load(config, overrides).run.name
    submission_id = f"hone-{name}-{secrets.token_hex(4)}"
    deadline = time.monotonic() + START_S
    while True:
        try:
            client = _client(address)
            _refuse_open_cluster(address)
            _submit(client, submission_id, arguments, name)
            return Submission(address, submission_id, client)
        except AuthenticationError as error:
            raise ConfigError(f"--address {address}: {_plain(error)}") from error
        except (OSError, RuntimeError) as error:  # OSError: no connection, or a bad HTTP status
            if _is_refusal(error) or time.monotonic() > deadline:
                raise ConfigError(f"--address {address}: {_plain(error)}") from error
            logger.info("the cluster is not ready: %s", _plain(error))
            time.sleep(PAUSE_S)


def follow(submission: Submission) -> int:
    """Print what the job prints until it ends; its exit code."""
    for text in _logs(submission):
        print(text, end="", flush=True)
    details = _ended(submission)
    code = EXIT_CODES[str(details.status.value)]
    if code == 1 and details.driver_exit_code is None:
        raise StageError("job", f"{submission.submission_id}: {details.message}")
    return int(details.driver_exit_code or code)


def _arguments(config: Path, overrides: list[str], run: str | None, resume: bool) -> list[str]:
    """The command line of the job; refuses what a job could not find or would lose."""
    settings = config_file.load(config, overrides)
    here = Path.cwd()
    try:
        relative = config.resolve().relative_to(here.resolve())
    except ValueError:
        raise ConfigError(
            f"{config}: must lie below the current directory {here}, which travels with the job"
        ) from None
    if not Path(settings.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir: must be an absolute path on storage that all nodes mount, got "
            f"{settings.run.dir!r}: a job's own directory is deleted with the job"
        )
    options = ["--run", run] if run else []
    options += ["--resume"] if resume else []
    return ["-m", "serve.cli", "train", str(relative), *overrides, "--address", "auto", *options]


def _client(address: str) -> Any:
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {address}: must be the head's dashboard, like http://HEAD:8265; "
            "on a node of the cluster, `hone train --address auto` joins it"
        )
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's own has no deadlines."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            ask: Any = getattr(super(), "_do_request")  # noqa: B009 (Ray types it in part only)
            limits = REQUEST_S if options.get("data") is None else UPLOAD_S
            return ask(*arguments, timeout=limits, **options)

    return Client(address)


def _refuse_open_cluster(address: str) -> None:
    from actors.preflight import open_dashboard

    problem = open_dashboard(address.rstrip("/"))
    if problem is not None:
        raise ConfigError(problem)


def _submit(client: Any, submission_id: str, arguments: list[str], name: str) -> None:
    from actors.connection import NOT_SENT

    try:
        client.submit_job(
            entrypoint=shlex.join(["python", *arguments]),
            submission_id=submission_id,
            runtime_env={
                "working_dir": str(Path.cwd()),
                "excludes": NOT_SENT,
                "env_vars": STOP_WAIT,
            },
            metadata={"hone_run": name},
        )
    except RuntimeError as error:
        if "already exists" not in str(error):  # an earlier try went through without an answer
            raise


def _ended(submission: Submission) -> Any:
    """What is known of the job once it has ended; a head that answers with errors is asked again.

    Raises `StageError` when it does so for `START_S`.
    """
    deadline = time.monotonic() + START_S
    while True:
        try:
            details = submission.client.get_job_info(submission.submission_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                text = f"{submission.submission_id}: nobody says how it is: {_plain(error)}"
                raise StageError("job", text) from error
        else:
            if _is_over(details):
                return details
            deadline = time.monotonic() + START_S
        time.sleep(PAUSE_S)


def _logs(submission: Submission) -> Iterator[str]:
    """Chunks of the job's output as they come, for as long as the head sends them, or says after
    `SILENCE_S` that there may be more.
    """
    from aiohttp import ClientError

    stream = submission.client.tail_job_logs(submission.submission_id)
    loop = asyncio.new_event_loop()
    chunk: asyncio.Future[str] = loop.create_future()
    try:
        while True:
            chunk = asyncio.ensure_future(anext(stream), loop=loop)
            try:
                while not loop.run_until_complete(asyncio.wait({chunk}, timeout=SILENCE_S))[0]:
                    if _is_over(submission.client.get_job_info(submission.submission_id)):
                        return
                yield chunk.result()
            except StopAsyncIteration:
                return
            except (OSError, RuntimeError, ClientError) as error:
                logger.warning("the output cannot be followed, the job goes on: %s", _plain(error))
                return
    finally:
        chunk.cancel()
        loop.run_until_complete(asyncio.wait({chunk}, timeout=CLOSE_S))
        loop.close()


def _is_over(details: Any) -> bool:
    return str(details.status.value) in EXIT_CODES


def _is_refusal(error: Exception) -> bool:
    """Whether trying again is useless: the head understood the request and will not have it."""
    return "status code 4" in str(error)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())
