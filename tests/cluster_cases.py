"""Several real Ray nodes on this machine, with token authentication and a Redis that all reach."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from cluster import ray_token
from cluster.embedded_redis import EmbeddedRedis
from cluster.redis_client import URL_VARIABLE

ROOT = Path(__file__).parents[1]
HONE = Path(sys.executable).parent / "hone"
QUICKSTART = "deploy/configs/quickstart.yaml"
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8", "eval.every=100000",
    "tasks.skip_uniform=false", "run.checkpoint_every=2", "resources.accelerator=cpu",
]  # fmt: skip
LABELS = "resources.labels={" + ", ".join(
    f"{role}: {{pool: {role}}}" for role in ("learner", "rollout", "reward")
) + "}"  # fmt: skip
# A dead node is noticed within seconds; Ray's defaults suit clusters with slow networks.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ThreeNodes:
    """Head, rollout node and reward node; nodes can be killed and new ones join."""

    def __init__(self, place: Path, redis_pid: int) -> None:
        from ray.cluster_utils import Cluster

        self.redis_pid = redis_pid
        self.dashboard_port = free_port()
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "labels": {"pool": "learner"},
                "node_ip_address": "127.0.0.1",
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": self.dashboard_port,
                "temp_dir": str(place),
            },
        )
        self.rollout_node = self.add("rollout")
        self.reward_node = self.add("reward")

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add(self, pool: str) -> Any:
        return self.cluster.add_node(num_cpus=1, labels={"pool": pool}, node_ip_address="127.0.0.1")

    def kill(self, node: Any) -> None:
        """As a host that loses power: every process at once, none asked."""
        self.cluster.remove_node(node, allow_graceful=False)

    @property
    def exporters(self) -> list[str]:
        """URLs of the metrics of every living node."""
        nodes = self.cluster.list_all_nodes()
        return [f"http://127.0.0.1:{node.metrics_export_port}/metrics" for node in nodes]

    @property
    def pids(self) -> list[int]:
        """Every process that the nodes have started, however deep."""
        import psutil

        roots = {
            info.process.pid
            for node in self.cluster.list_all_nodes()
            for infos in node.all_processes.values()
            for info in infos
        }
        found = set(roots)
        for pid in roots:
            if psutil.pid_exists(pid):
                found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
        return sorted(found)


@contextmanager
def three_nodes(place: Path) -> Iterator[ThreeNodes]:
    """The cluster, with its token in a file of its own and its Redis in the environment."""
    with ExitStack() as stack:
        short = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp"))
        server = stack.enter_context(EmbeddedRedis(place / "redis"))
        environment = IMPATIENT | {
            ray_token.TOKEN_PATH: str(place / "token"),
            ray_token.MODE: "token",
            URL_VARIABLE: server.url,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{HONE.parent}{os.pathsep}{os.environ['PATH']}",
        }
        stack.enter_context(mock.patch.dict(os.environ, environment))
        ray_token.ensure(may_create=True)
        nodes = ThreeNodes(Path(short), server.pid)
        stack.callback(nodes.cluster.shutdown)
        yield nodes


def submit(nodes: ThreeNodes, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """`hone submit` of the quickstart, reduced, as a user types it."""
    return subprocess.Popen(
        [HONE, "submit", QUICKSTART, "--address", nodes.dashboard, "--run", "demo", *SMALL, LABELS,
         f"run.dir={run_dir}", *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def wait_for(done: Callable[[], bool], what: str, deadline_s: float) -> float:
    """Seconds until `done`; fails naming `what` past the deadline."""
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < deadline_s, f"{what} did not happen in {deadline_s} s"
        time.sleep(0.2)
    return time.monotonic() - started
