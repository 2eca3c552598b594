"""What must hold on a joined cluster before a run starts on it.

Invariant: every problem is one line that names its knob, and all are found in one pass; tasks that
look at the nodes end here. Called by `actors.train` right after it has joined a cluster, and by
`hone check --address`.
"""

import logging
import secrets
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import devices
from actors.capacity import (
    ClusterNode,
    away_from_gpus,
    beyond,
    cluster_nodes,
    growth,
    shortages,
)
from actors.connection import join
from actors.placement import Placement
from cluster import environment, ray_token
from cluster.config import Config, PretrainedPolicy
from cluster.errors import ConfigError
from cluster.run_dir import RunDir

NODES_DEADLINE_S = 60.0
REQUEST_S = 5.0


def require_capacity(config: Config, address: str) -> None:
    """Join the cluster at `address` and leave it again; `ConfigError` names what it lacks for good.

    What an autoscaler may still add is waited for by the run itself.
    """
    ray_token.ensure(may_create=False)
    join(address, namespace="hone", log_to_driver=False, logging_level=logging.ERROR)
    try:
        missing = missing_capacity(config)
        if missing:
            raise ConfigError("\n".join(missing))
    finally:
        ray.shutdown()


def missing_capacity(config: Config) -> list[str]:
    """What the cluster lacks for this run for good: by its total size, busy or not, and where an
    autoscaler may add to it by the most that this tells of.
    """
    nodes = cluster_nodes()
    placement = Placement.of(config, sum(n.resources.get("GPU", 0.0) for n in nodes))
    selector = away_from_gpus(nodes) if placement.is_gpu else {}
    placement = Placement(config, placement.is_gpu, reward_selector=selector)
    requests = [*placement.requests(), *placement.reward_requests()]
    missing = [*devices.problems(placement), *shortages(requests, nodes)]
    try:
        most = growth() if missing else None
    except RayError:
        most = {}  # a head that does not answer is a problem of its own, see `node_problems`
    return missing if most is None else beyond(requests, nodes, most)


def node_problems(config: Config, run: RunDir) -> list[str]:
    """Nodes that cannot see the run directory or the policy's, or run on other packages than this
    process.
    """
    token = secrets.token_hex(8)
    mark = run.path / f".seen-{token}"
    mark.write_text(token)
    try:
        asked = [(node, _ask(node, mark, model_place(config))) for node in cluster_nodes()]
        return [p for node, answer in asked for p in _judge(node, answer, mark, token)]
    finally:
        mark.unlink(missing_ok=True)


def open_dashboard(address: str) -> str | None:
    """A problem line when the dashboard at `address` (http://HOST:PORT) answers without a token."""
    request = urllib.request.Request(f"{address}/api/jobs/")
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_S) as answer:
            status = answer.status
    except HTTPError as error:
        status = error.code
    except (URLError, OSError):
        return None  # nothing is served there
    if status in (401, 403) or status >= 500:  # refused, or not ready to decide
        return None
    return (
        f"{address} answers without a token (HTTP {status}): start every node of the cluster with "
        "RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN_PATH"
    )


def model_place(config: Config) -> str:
    """The directory of the policy, where it is one of the user's; "" for one that the run makes or
    fetches into a place of its own.
    """
    model = config.policy.model if isinstance(config.policy, PretrainedPolicy) else ""
    place = Path(model).expanduser()
    return str(place) if model and place.is_dir() else ""


def _ask(node: ClusterNode, mark: Path, model: str) -> Any:
    where = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    ask: Any = ray.remote(num_cpus=0, max_retries=0)(_look)
    return ask.options(scheduling_strategy=where).remote(str(mark), model)


def _judge(node: ClusterNode, answer: Any, mark: Path, token: str) -> list[str]:
    name = f"node {node.node_id[:8]}"
    try:
        seen, missing, there = ray.get(answer, timeout=NODES_DEADLINE_S)
    except (RayError, GetTimeoutError) as error:
        return [f"{name} does not run Hone's code: {_first_line(error)}"]
    differing = environment.differences(environment.versions(), there)
    problems = [f"{name}: {line}" for line in differing]
    if seen != token:
        problems.append(
            f"run.dir: {name} does not see {mark.parent}; it must lie on storage that all nodes "
            "mount at the same path"
        )
    if missing:
        problems.append(
            f"policy.model: {name} does not see {missing}; it must lie on storage that all nodes "
            "mount at the same path"
        )
    return problems


def _look(mark: str, model: str) -> tuple[str, str, dict[str, str]]:
    """What the mark says, the directory `model` if it is not there, and the packages."""
    path = Path(mark)
    missing = "" if not model or Path(model).is_dir() else model
    return path.read_text() if path.is_file() else "", missing, environment.versions()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
