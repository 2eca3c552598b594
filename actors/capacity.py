"""What a run asks of a cluster, what the cluster's nodes offer, and what is missing between them.

Invariant: nothing is started or reserved here, so `hone check` can ask the same question as the run
itself. Labels follow Ray's selectors: `h100`, `!h100`, `in(a,b)`, `!in(a,b)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from actors.placement import BundleRequest

ASK_S = 60.0
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


def has_autoscaler() -> bool:
    """Whether an autoscaler has told the cluster how large it may grow."""
    from ray._private.state import state
    from ray.util.client import ray as client

    if client.is_connected():  # this process is outside the cluster and cannot see its state
        ask = ray.remote(num_cpus=0)(has_autoscaler).remote()
        return bool(ray.get(ask, timeout=ASK_S))
    return state.get_max_resources_from_cluster_config() is not None


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
