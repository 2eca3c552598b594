"""What the admin routes answer: one record per route, for server, document and client alike.

Invariant: `serve.client` decodes with the very types that `serve.admin_api` encodes.
"""

import msgspec

from cluster.run_dir import Event, Sample
from serve.release import ReleaseState
from serve.weight_library import Version


class Runs(msgspec.Struct, frozen=True):
    """Names of the runs beside the served one."""

    runs: list[str]
    served: str


class EngineState(msgspec.Struct, frozen=True):
    """One engine of a replica. `pause_s` is what its last weight update took."""

    policy_version: int | None
    running: int
    pause_s: float


class Versions(msgspec.Struct, frozen=True):
    """Versions that requests may name, oldest first, and what the replica's engines hold."""

    versions: list[Version]
    engines: list[EngineState]


class Release(msgspec.Struct, frozen=True):
    """What `policy` means now; `problem` is what the replica could not do about it."""

    state: ReleaseState
    problem: str


class Metrics(msgspec.Struct, frozen=True):
    """Rows of metrics.jsonl in step order; each has the key `step`."""

    rows: list[dict[str, float]]


class Events(msgspec.Struct, frozen=True):
    events: list[Event]


class Samples(msgspec.Struct, frozen=True):
    """The trajectories kept of one step, and all steps that have some."""

    steps: list[int]
    samples: list[Sample]
