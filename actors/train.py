"""Launch: from a checked config to a finished run, and everything stopped again.

Invariant: whatever happens between start and end (success, failure, Ctrl-C), no process that was
started here outlives `run`. Called by `hone train`; `python -m actors.train CONFIG` is the entry
of a Ray job.
"""

import itertools
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray._raylet import Config as RayConfig  # pyright: ignore
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import preflight
from actors.connection import join, own_ray
from actors.interrupts import interrupts, note_signals
from actors.keepers import HANG_S, Pulse, RedisKeeper
from actors.placement import QUIET_ENV, Placement, on_this_machine
from actors.supervisor import Supervisor
from cluster import config_file, environment, ray_token, status
from cluster.config import Config
from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import ConfigError, DeadlineError, HoneError, StageError, StartLostError
from cluster.ledger import Ledger
from cluster.owned_folder import PREFIX, owned
from cluster.redis_client import buffer_url, connect
from cluster.resume import refuse_changes, saved_state
from cluster.run_dir import RunDir
from cluster.run_lock import sole_launcher
from cluster.status import RunStatus

INTERRUPTED = 130
# For the step in hand and its checkpoint, after an interrupt; on a cluster less than the minute
# that `ray job stop` waits (serve/submit.py, deploy/kuberay).
STOP_S, CLUSTER_STOP_S = 12.0, 50.0
POLL_S = 0.2
logger = logging.getLogger(__name__)


def run(config: Config, *, run_dir: RunDir, address: str) -> int:
    """Train and wait; 0 when done, 130 when interrupted (`cluster.resume.saved_state`).

    `address` is `local` (a Ray of our own, stopped at the end), `auto`, or the address of a
    cluster. Raises `ConfigError` before anything started, `StageError` when the run failed.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: the run's files lie where the launcher runs, so it has to run "
            "on a node: `hone submit --address http://HEAD:8265`, or there with --address auto"
        )
    url = buffer_url(config.buffer, address)
    if url:
        connect(url).close()  # a server that is away is refused here, rather than waited for
        run_dir.own_buffer()
    config = on_this_machine(config) if address == "local" else config
    try:
        return _run(config, run_dir, address, url)
    except HoneError as error:
        _note_failure(run_dir, error)
        raise


def _run(config: Config, run_dir: RunDir, address: str, url: str | None) -> int:
    """Redis, Ray and the controller, all of which end with it."""
    with ExitStack() as stack:
        interrupt = stack.enter_context(interrupts())
        _announce(config, run_dir, "starting Redis", 0.5)
        server = None if url else EmbeddedRedis(run_dir.redis, lambda: bool(interrupt))
        try:
            if server is not None:
                stack.enter_context(server)
        except DeadlineError:
            if interrupt:
                return INTERRUPTED
            raise
        if run_dir.weights.name.startswith(PREFIX):  # in memory
            stack.enter_context(owned(run_dir.weights))
        stack.callback(_remove_weights, run_dir)
        url = url or (server.url if server else "")
        _announce(config, run_dir, "starting Ray", 6.0)
        stack.enter_context(ray_session(config, run_dir, address))
        note_signals(interrupt)  # starting Ray has put its own handlers in place
        if address != "local":
            _announce(config, run_dir, "looking at the cluster's nodes", 5.0)
            run_dir.share_weights()
            _refuse_unfit_cluster(config, run_dir)
        _announce(config, run_dir, "starting the controller", 4.0)
        stop_s = STOP_S if address == "local" else CLUSTER_STOP_S
        return _conduct(config, run_dir, url, interrupt, server, stop_s)


def _conduct(
    config: Config,
    run_dir: RunDir,
    url: str,
    interrupt: list[int],
    server: EmbeddedRedis | None,
    stop_s: float,
) -> int:
    """Create the controller and wait for it; one that dies or hangs, or loses a part while they
    come up, is followed by another, which goes on from the last durable state. The first interrupt
    asks it to stop in `stop_s`, the second leaves.
    """
    from actors.controller import Controller

    supervisor = Supervisor()
    deadline: float | None = None
    keeper = None if server is None else RedisKeeper(server)
    for attempt in itertools.count():
        controller: Any = (
            ray.remote(Controller)
            .options(
                name=f"hone/{run_dir.buffer_id}/controller/{attempt}",
                num_cpus=0,
                max_concurrency=1000,
                # Beside the launcher: a lost rollout or reward node must not take it along.
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=False
                ),
            )
            .remote(config, str(run_dir.path), url)
        )
        finished = controller.run.remote()
        pulse = Pulse(controller.__ray_ready__.remote)
        while not ray.wait([finished], timeout=POLL_S)[0]:
            if keeper is not None:
                keeper.keep_up()
            if pulse.is_gone():
                ray.kill(controller)
            if interrupt and deadline is None:
                deadline = time.monotonic() + stop_s
                controller.stop.remote()
            if deadline is not None and (len(interrupt) > 1 or time.monotonic() > deadline):
                logger.warning("no controller stopped in %.0f s: ended now", stop_s)
                return INTERRUPTED
        try:
            ray.get(finished, timeout=POLL_S)
            return INTERRUPTED if interrupt else 0
        except RayError as error:
            if isinstance(error, RayTaskError):
                if not isinstance(failure := _cause(error), StartLostError):
                    raise failure from None
                ray.kill(controller)  # and with it the parts that came up
                error = failure
            if isinstance(error, StartLostError):
                cause = f"lost what it was starting: {error}"
            else:
                cause = f"died: {error}"
            if pulse.is_gone():
                cause = f"gave no answer for {HANG_S:.0f} s"
            _note(run_dir, "worker_died", actor="controller", cause=cause[:300])
            lost = StageError("controller", f"{cause}; see {run_dir.logs}")
            supervisor.controller_lost(lost, step=Ledger(run_dir.ledger).last_step())
        if interrupt:
            break
    return INTERRUPTED


def _note(run_dir: RunDir, kind: str, **fields: object) -> None:
    """An event, unless the disk is full: the run has to go on, or to end for its own reason."""
    try:
        run_dir.append_event(kind, **fields)
    except OSError as error:
        logger.warning("%s could not be noted: %s", kind, error)


def _note_failure(run_dir: RunDir, error: HoneError) -> None:
    """Where the controller could not: it had died, or there was none yet."""
    known = status.read(run_dir.path)
    if known is None or known.phase == "failed":
        return
    _note(run_dir, "run_failed", error=str(error))
    now = time.time()
    failed = msgspec.structs.replace(known, phase="failed", phase_detail="", error=str(error),
                                     phase_started_at=now, updated_at=now)  # fmt: skip
    with suppress(OSError):
        status.write(run_dir.path, failed)


def _remove_weights(run_dir: RunDir) -> None:
    """Where they are is known at the end: a cluster's run has moved them into its directory."""
    shutil.rmtree(run_dir.weights, ignore_errors=True)


def _cause(error: RayTaskError) -> HoneError:
    cause = error.cause
    return cause if isinstance(cause, HoneError) else StageError("run", str(cause))


def _refuse_unfit_cluster(config: Config, run_dir: RunDir) -> None:
    """Raise `ConfigError` with every reason why this cluster cannot run this."""
    problems = preflight.missing_capacity(config)
    dashboard = ray._private.worker.get_dashboard_url()  # pyright: ignore
    exposed = preflight.open_dashboard(f"http://{dashboard}") if dashboard else None
    problems += [exposed] if exposed else []
    lock = environment.lock_file(Path(__file__).parents[1])
    problems += environment.lock_differences(lock) if lock.is_file() else []
    problems += preflight.node_problems(config, run_dir)
    if problems:
        raise ConfigError("\n".join(problems))


@contextmanager
def ray_session(config: Config, run_dir: RunDir, address: str) -> Iterator[None]:
    """Connect to Ray; a local one is ours alone and leaves nothing behind."""
    os.environ.update(QUIET_ENV)
    ray_token.ensure(may_create=address == "local")
    RayConfig.initialize("")  # Ray has read the environment when it was imported
    common: dict[str, Any] = {
        "namespace": "hone",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address != "local":
        join(address, **common)
        try:
            yield
        finally:
            ray.shutdown()
        return
    placement = Placement.of(config)
    cores = config.resources.cpus or os.cpu_count() or 1

    def keep_logs(folder: Path) -> None:
        _keep_worker_logs(folder, run_dir.logs / "ray")

    with own_ray(max(cores, placement.total_cpus), {}, keep_logs, **common):
        yield


def _keep_worker_logs(temporary: Path, target: Path) -> None:
    """What the actors printed, beside the run; empty files are left out."""
    try:
        for file in temporary.glob("session_2*/logs/worker-*"):
            if file.stat().st_size:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / file.name)
    except OSError as error:
        logger.warning("what the actors printed could not be kept: %s", error)


def _announce(config: Config, run_dir: RunDir, detail: str, expected_s: float) -> None:
    """Tell the live view what happens before the controller exists to do so."""
    now = time.time()
    status.write(
        run_dir.path,
        RunStatus(
            run=run_dir.name,
            phase="starting",
            phase_detail=detail,
            phase_expected_s=expected_s,
            phase_started_at=now,
            started_at=now,
            updated_at=now,
            steps=config.run.steps,
        ),
    )


def main(arguments: list[str]) -> int:
    """`python -m actors.train CONFIG [key=value ...]`: train on this job's Ray cluster, going on
    from the last checkpoint of the run if there is one.
    """
    if not arguments:
        raise ConfigError("usage: python -m actors.train CONFIG [key=value ...]")
    config = config_file.load(arguments[0], arguments[1:])
    place = RunDir.at(config.run.dir, config.run.name, exist_ok=True)
    if place.config.exists():
        refuse_changes(config, place)
    with sole_launcher(place):
        run_dir = RunDir.create(
            config.run.dir, config.run.name, config_file.dump(config), exist_ok=True
        )
        code = run(config, run_dir=run_dir, address="auto")
    print(saved_state(run_dir))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except HoneError as problem:
        print(f"failed: {problem}", file=sys.stderr)
        sys.exit(1)
