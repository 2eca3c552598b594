"""How a driver joins a running Ray cluster.

Invariant: what the driver runs is what every node runs: the current directory travels with it.
Called by the launcher, by `hone check --address` and by `hone submit`, which sends the same.
"""

import os
from pathlib import Path
from typing import Any

import ray
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
