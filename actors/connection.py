"""How a driver joins a running Ray cluster, or keeps one of its own to itself.

Invariant: what the driver runs is what every node of a cluster runs: the current directory travels
with it; a Ray of one's own has the address 127.0.0.1. Called by the launchers of runs and of the
endpoint, by `hone check --address` and by `hone submit`, which sends the same directory.
"""

import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from cluster.errors import ConfigError, StageError
from cluster.owned_folder import PREFIX, owned

NOT_SENT = [".git", ".venv", "runs", "checkpoints", "**/__pycache__", ".*_cache"]
# Set by Ray in the entry point of a job, whose directory was sent with the submission.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
NODE_S, TOO_LATE = 30, "timed out during startup"  # Ray's own limit and words (2.60)
NUM_TRIES = 2
# Of workers, in a Ray of one's own: below Ray's own processes, and with room for what steps back
# from them (`actors.engine_imports`), of which Ray's default, 15, leaves little.
NICENESS = 5
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # kept from run to run
logger = logging.getLogger(__name__)


def join(address: str, **settings: Any) -> None:
    """Connect to a running cluster; the code and data of this directory travel with the driver."""
    if JOB_VARIABLE not in os.environ:
        settings["runtime_env"] = {"working_dir": str(Path.cwd()), "excludes": NOT_SENT}
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster can be joined: {error}") from error


@contextmanager
def own_ray(
    num_cpus: int,
    variables: Mapping[str, str],
    at_end: Callable[[Path], None] | None = None,
    **settings: Any,
) -> Iterator[None]:
    """A Ray of one's own on loopback, which leaves nothing behind. `variables` are the workers'
    environment, beside what lets them import what the driver can; `at_end` sees Ray's folder when
    its processes have ended, before it is removed. So are the workers' temporary files, of which
    those that are killed cannot remove their own.

    Raises `StageError` where Ray's node does not come up: a machine is busy beyond measure.
    """
    key = secrets.token_hex(4)
    folder = Path("/tmp", f"{PREFIX}{key}")  # short: it holds unix sockets
    scratch = Path(tempfile.gettempdir(), f"{PREFIX}{key}-scratch")
    paths = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    ours = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TMPDIR": str(scratch),
        "VLLM_RPC_BASE_PATH": str(folder),  # of sockets: TMPDIR may be too long for them
        COMPILED: os.environ.get(COMPILED, f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"),
    }
    settings |= {"num_cpus": num_cpus, "runtime_env": {"env_vars": {**variables, **ours}}}
    with owned(folder), owned(scratch):
        try:
            for trial in range(1, NUM_TRIES + 1):
                if _is_up(folder, settings):
                    break
                if trial == NUM_TRIES:
                    raise StageError("ray", f"no node within {NODE_S} s, {NUM_TRIES} times: is "
                                     "this machine too busy? (`hone doctor` looks)")  # fmt: skip
                logger.warning("Ray's node did not come up within %d s: trying once more", NODE_S)
            yield
        finally:
            ray.shutdown(wait_for_processes=True)
            if at_end is not None:
                at_end(folder)


def _is_up(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Start Ray; what a node that came too late left running is ended."""
    try:
        with on_loopback():
            ray.init(
                address="local",
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                _system_config={"worker_niceness": NICENESS},
                **settings,
            )
    except Exception as error:  # of no class of its own
        if TOO_LATE not in str(error):
            raise
        ray.shutdown()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(str(folder) in argument for argument in process.cmdline()):
                    process.kill()
        return False
    return True


@contextmanager
def on_loopback() -> Iterator[None]:
    """Ray started inside takes 127.0.0.1 for its node's address, and listens there.

    Ray replaces a loopback address that it is given by the host's own, except where it holds
    several nodes to be impossible: that is what is switched off here.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
