"""What a run asks of a cluster, what the cluster's nodes offer, and what is missing between them.

Invariant: nothing is started or reserved here, so `hone check` can ask the same question as the run
itself. Labels follow Ray's selectors: `h100`, `!h100`, `in(a,b)`, `!in(a,b)`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.placement import BundleRequest

ASK_S = 60.0
HEAD = "node:__internal_head__"
# KubeRay starts a head without Ray's own monitor where it runs an autoscaler beside it.
KUBERAY_START, AUTOSCALED = "KUBERAY_GEN_RAY_START_CMD", "--no-monitor"
ACCELERATOR_LABEL = "ray.io/accelerator-type"


@dataclass(frozen=True)
class ClusterNode:
    """Total resources and labels of one living node."""

    node_id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


def cluster_nodes() -> list[ClusterNode]:
    """Living nodes of the Ray cluster that this process has joined."""
    return [
        ClusterNode(node["NodeID"], node["Resources"], node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]


def growth() -> dict[str, float] | None:
    """The most of each resource that an autoscaler may ever bring this cluster to: empty where it
    tells nobody, as KubeRay's, None without one. Raises `RayError` when the head does not answer.
    """
    ask: Any = ray.remote(num_cpus=0, resources={HEAD: 0.001})(growth_seen_by_head)
    return ray.get(ask.remote(), timeout=ASK_S)


def growth_seen_by_head() -> dict[str, float] | None:
    from ray._private.state import state

    told = state.get_max_resources_from_cluster_config()
    if told is None:
        return {} if AUTOSCALED in os.environ.get(KUBERAY_START, "") else None
    return {name: float(amount) for name, amount in told.items()}


def beyond(
    requests: Sequence[BundleRequest], nodes: Sequence[ClusterNode], most: Mapping[str, float]
) -> list[str]:
    """One line for each resource of which `requests` need more in all than `nodes` have and an
    autoscaler can give; none where it does not tell.
    """
    lines: list[str] = []
    for name in sorted({name for request in requests for name in request.resources}):
        asking = [request for request in requests if request.resources.get(name)]
        wanted = sum(request.count * request.resources[name] for request in asking)
        has = sum(node.resources.get(name, 0.0) for node in nodes)
        limit = max(has, most.get(name, 0.0))
        if most and wanted > limit + 1e-9:
            knobs = ", ".join(request.knobs for request in asking)
            lines.append(
                f"resources: {wanted:g} {name} are needed, and the cluster's autoscaler ends at "
                f"{limit:g} ({knobs})"
            )
    return lines


def shortages(requests: Sequence[BundleRequest], nodes: Sequence[ClusterNode]) -> list[str]:
    """One line for each request that can never fit on `nodes`, naming what is missing.

    Bundles are laid out greedily, those first that fewest nodes could hold, of these those that
    need most GPUs: SPREAD on the emptiest node, PACK on the fullest.
    """

    def choices(request: BundleRequest) -> tuple[int, float]:
        could = [n for n in nodes if _fits(request.resources, n.resources)]
        num_could = sum(labels_match(request.labels, n.labels) for n in could)
        return num_could, -request.resources.get("GPU", 0.0)

    free = {node.node_id: dict(node.resources) for node in nodes}
    lines: list[str] = []
    for request in sorted(requests, key=choices):
        matching = [n.node_id for n in nodes if labels_match(request.labels, n.labels)]
        num_placed = 0
        used = dict.fromkeys(matching, 0)
        for _ in range(request.count):
            fitting = [n for n in matching if _fits(request.resources, free[n])]
            if not fitting:
                break
            sign = 1 if request.strategy == "SPREAD" else -1
            chosen = min(fitting, key=lambda n: sign * used[n])
            used[chosen] += 1
            num_placed += 1
            for name, amount in request.resources.items():
                free[chosen][name] = free[chosen].get(name, 0.0) - amount
        if num_placed < request.count:
            lines.append(_explain(request, num_placed, matching, free))
    return lines


def labels_match(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` satisfies every selector of `wanted`."""
    return all(_matches(selector, labels.get(key)) for key, selector in wanted.items())


def away_from_gpus(nodes: Sequence[ClusterNode]) -> dict[str, str]:
    """The selector of nodes without a GPU; empty where every node has one, or none has."""
    types = {n.labels[ACCELERATOR_LABEL] for n in nodes if ACCELERATOR_LABEL in n.labels}
    has_plain = any(n.resources.get("GPU", 0.0) == 0 for n in nodes)
    return {ACCELERATOR_LABEL: f"!in({','.join(sorted(types))})"} if types and has_plain else {}


def _matches(selector: str, value: str | None) -> bool:
    if selector.startswith("!"):
        return not _matches(selector[1:], value)
    if selector.startswith("in(") and selector.endswith(")"):
        return value in [part.strip() for part in selector[3:-1].split(",")]
    return value == selector


def _fits(resources: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(free.get(name, 0.0) >= amount - 1e-9 for name, amount in resources.items())


def _explain(
    request: BundleRequest,
    num_placed: int,
    matching: Sequence[str],
    free: Mapping[str, Mapping[str, float]],
) -> str:
    left = {
        name: max((free[node].get(name, 0.0) for node in matching), default=0.0)
        for name in request.resources
    }
    if not matching:
        rest = "no node has these labels"
    else:
        most = ", ".join(f"{amount:g} {name}" for name, amount in left.items())
        rest = f"{num_placed} fit on {len(matching)} matching node(s), which have {most} left"
    return f"resources: {request.role} needs {request}; {rest} ({request.knobs})"
