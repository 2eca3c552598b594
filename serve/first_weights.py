"""A run that is still starting: wait until it has weights that an endpoint can serve.

Invariant: the wait goes on only while the run reports, so it ends with weights or with a reason.
Called by `hone serve` before anything else is started.
"""

import time
from collections.abc import Callable

from cluster import published, status
from cluster.checkpoint_store import CheckpointStore
from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from serve.status_view import ENDED, phase_name

SILENT_S = 120.0
POLL_S = 0.3


def wait_for(run: RunDir, announce: Callable[[str], None]) -> None:
    """Return once `run` has published a version or keeps a checkpoint.

    Tells each phase of the start through `announce`. Raises `ConfigError` when the run ended, or
    has not reported for `SILENT_S`, without either. A run that never has is as old as its config.
    """
    told = ""
    while published.read(run.weights) is None and not has_checkpoint(run):
        state = status.read(run.path)
        reported_at = run.config.stat().st_mtime if state is None else state.updated_at
        has_ended = state is not None and state.phase in ENDED
        if has_ended or time.time() - reported_at > SILENT_S:
            raise ConfigError(
                f"{run.path}: the run has published no weights and no checkpoint, and does not "
                f"train; start it with `hone train CONFIG --run {run.name} --resume`"
            )
        # "warm_start: supervised, step 10 of 200, ..." is told once, not at every step.
        name = "starting" if state is None else phase_name(state)
        phase = name.partition(",")[0].partition(" step ")[0].rstrip(":")
        if phase != told:
            announce(f"{run.name} is {phase}; waiting for its first weights")
            told = phase
        time.sleep(POLL_S)


def has_checkpoint(run: RunDir) -> bool:
    return bool(CheckpointStore(run.checkpoints, keep=1).steps())
