"""How a driver joins a running Ray cluster, or keeps one of its own to itself.

Invariant: what the driver runs is what every node of a cluster runs: the current directory travels
with it; a Ray of one's own has the address 127.0.0.1. Called by the launchers of runs and of the
endpoint, by `hone check --address` and by `hone submit`, which sends the same directory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from cluster.errors import ConfigError

NOT_SENT = [".git", ".venv", "runs", "checkpoints", "**/__pycache__", ".*_cache"]
# Set by Ray in the entry point of a job, whose directory was sent with the submission.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def join(address: str, **settings: Any) -> None:
    """Connect to a running cluster; the code and data of this directory travel with the driver."""
    if JOB_VARIABLE not in os.environ:
        settings["runtime_env"] = {"working_dir": str(Path.cwd()), "excludes": NOT_SENT}
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster can be joined: {error}") from error


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
