"""Several real Ray nodes on this machine, with token authentication and a Redis that all reach."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster import ray_token
from cluster.embedded_redis import EmbeddedRedis
from cluster.redis_client import URL_VARIABLE

ROOT = Path(__file__).parents[1]
HONE = Path(sys.executable).parent / "hone"
RAY = HONE.with_name("ray")
QUICKSTART = "deploy/configs/quickstart.yaml"
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "warm_start.examples=500", "tasks.train.settings.size=500",
    # The policy gets nothing right, and a run of equal rewards ends: lengths vary, and go on to.
    "rewards.verifiers.short={use: length, weight: 0.1, settings: {max_tokens: 99}}",
    "learner.lr=1.0e-7",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8", "eval.every=100000",
    "tasks.skip_uniform=false", "run.checkpoint_every=2", "resources.accelerator=cpu",
]  # fmt: skip
LABELS = "resources.labels={" + ", ".join(
    f"{role}: {{pool: {role}}}" for role in ("learner", "rollout", "reward")
) + "}"  # fmt: skip
START_S = 120.0
HEAD = "127.0.0.2"  # each node has an address of its own, as hosts have
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


class Node:
    """One `ray start --block` and all that it has started."""

    def __init__(
        self, address: str, arguments: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.metrics_port = free_port()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [RAY, "start", "--block", f"--node-ip-address={address}", "--num-cpus=1",
                 "--object-store-memory=150000000", "--min-worker-port=0", "--max-worker-port=0",
                 f"--metrics-export-port={self.metrics_port}",
                 f"--dashboard-agent-listen-port={free_port()}", *arguments],
                env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent,
            )  # fmt: skip

    @property
    def pids(self) -> list[int]:
        if self.process.poll() is not None:
            return []
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *[child.pid for child in children]]

    def kill(self) -> None:
        """As a host that loses power: every process at once, none asked."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


class ThreeNodes:
    """Head, rollout node and reward node; nodes can be killed and new ones join."""

    def __init__(
        self, logs: Path, temporary: str, environment: dict[str, str], redis_pid: int
    ) -> None:
        self._logs = logs
        self.environment = environment
        self.redis_pid = redis_pid
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.client_port = free_port()
        self._gcs_port = free_port()
        self.nodes: list[Node] = []
        self.head = self._start(
            "learner", "--head", f"--port={self._gcs_port}", f"--temp-dir={temporary}/ray",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard.rpartition(':')[2]}",
            f"--ray-client-server-port={self.client_port}",
        )  # fmt: skip
        self._wait(1)
        self.rollout_node = self.add("rollout")
        self._wait(2)
        self.reward_node = self.add("reward")
        self._wait(3)

    def _wait(self, num_nodes: int) -> None:
        """A busy machine takes its time; what the nodes said is shown when it fails."""
        try:
            wait_for(lambda: self._num_alive() == num_nodes, f"{num_nodes} nodes alive", START_S)
        except AssertionError as error:
            said = [f"{log.name}:\n{log.read_text()}" for log in self._logs.glob("*.log")]
            self.close()
            raise AssertionError("\n".join([str(error), *said])) from None

    def add(self, pool: str) -> Node:
        return self._start(pool, f"--address={HEAD}:{self._gcs_port}")

    def _start(self, pool: str, *arguments: str) -> Node:
        log = self._logs / f"{pool}-{len(self.nodes)}.log"
        address = f"127.0.0.{2 + len(self.nodes)}"
        node = Node(address, [f"--labels=pool={pool}", *arguments], self.environment, log)
        self.nodes.append(node)
        return node

    def _num_alive(self) -> int:
        try:
            return sum(node["state"] == "ALIVE" for node in self.state("nodes"))
        except (httpx.HTTPError, KeyError):
            return 0

    def state(self, what: str) -> list[dict[str, Any]]:
        """`nodes` or `actors`, from the head's state API."""
        token = Path(self.environment[ray_token.TOKEN_PATH]).read_text()
        reply = httpx.get(
            f"{self.dashboard}/api/v0/{what}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=10,
        )
        reply.raise_for_status()
        return reply.json()["data"]["result"]["result"]

    @property
    def exporters(self) -> list[str]:
        """URLs of the metrics of every living node."""
        alive = [node for node in self.nodes if node.process.poll() is None]
        return [f"http://127.0.0.1:{node.metrics_port}/metrics" for node in alive]

    @property
    def pids(self) -> list[int]:
        """Every process that the nodes have started, however deep."""
        return [pid for node in self.nodes for pid in node.pids]

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.kill()


@contextmanager
def three_nodes(place: Path) -> Iterator[ThreeNodes]:
    """The cluster, with its token in a file of its own and its Redis in the environment."""
    token = place / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with ExitStack() as stack:
        short = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp"))
        server = stack.enter_context(EmbeddedRedis(place / "redis"))
        environment = (
            os.environ
            | IMPATIENT
            | {
                ray_token.MODE: "token",
                ray_token.TOKEN_PATH: str(token),
                URL_VARIABLE: server.url,
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_metrics_report_interval_ms": "2000",
                "PATH": f"{HONE.parent}{os.pathsep}{os.environ['PATH']}",
            }
        )
        for name in ("RAY_ADDRESS", ray_token.TOKEN):
            environment.pop(name, None)
        nodes = ThreeNodes(place, short, environment, server.pid)
        stack.callback(nodes.close)
        yield nodes


def submit(nodes: ThreeNodes, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`hone submit` of the quickstart, reduced, as a user types it."""
    run_dir.mkdir()
    with (run_dir / "submit.log").open("wb") as output:
        return subprocess.Popen(
        [HONE, "submit", QUICKSTART, "--address", nodes.dashboard, "--run", "demo", *SMALL, LABELS,
         f"run.dir={run_dir}", *overrides],
        cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        env=nodes.environment | {"PYTHONPATH": str(ROOT)},
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
