"""Several real Ray nodes on this machine, with token authentication and a Redis that all reach."""

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

from cluster import ray_token, status
from cluster.embedded_redis import EmbeddedRedis
from cluster.redis_client import URL_VARIABLE
from cluster.run_dir import JsonLines, RunDir
from tests.processes import processes_of

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
START_S = 180.0  # a node, on two cores that others use, too
STEP_S = 900.0  # from the submission to the first step
POLL_S = 0.2
PORTS = range(15_000, 22_000)
HEAD = "127.0.0.2"  # each node has an address of its own, as hosts have
# A dead node refuses the question and is noticed within seconds; one that is only slow, as all are
# while an engine loads on the same cores, is given time.
PATIENCE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_worker_register_timeout_seconds": "180",
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "180",
}


def free_port() -> int:
    """A port that is free at every address and stays so: the kernel hands out none of these."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


class Node:
    """One `ray start --block` and all that it has started."""

    def __init__(
        self, address: str, arguments: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.metrics_port = free_port()
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [RAY, "start", "--block", f"--node-ip-address={address}", "--num-cpus=1",
                 "--object-store-memory=150000000", "--min-worker-port=0", "--max-worker-port=0",
                 f"--metrics-export-port={self.metrics_port}",
                 f"--dashboard-agent-listen-port={free_port()}", *arguments],
                env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent,
            )  # fmt: skip

    @property
    def is_up(self) -> bool:
        return self.process.poll() is None

    @property
    def pids(self) -> list[int]:
        """Of every process that the node has started, however deep."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [self.process.pid, *[child.pid for child in children]] if self.is_up else []

    def kill(self) -> None:
        """As a host that loses power: every process at once, none asked."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


class ThreeNodes:
    """Head, rollout node and reward node; nodes can be killed and new ones join. `stack` ends each
    node from the moment it is started.
    """

    def __init__(
        self, stack: ExitStack, logs: Path, environment: dict[str, str], redis_pid: int
    ) -> None:
        self._stack = stack
        self._logs = logs
        self.environment = environment
        self.redis_pid = redis_pid
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.client_port = free_port()
        self._gcs_port = free_port()
        self.nodes: list[Node] = []

    def start(self, temporary: str) -> None:
        """One after the other: each node is alive before the next is started. Sockets lie below
        `temporary`, which must be short.
        """
        self._start(
            "learner", "--head", f"--port={self._gcs_port}", f"--temp-dir={temporary}/ray",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard.rpartition(':')[2]}",
            f"--ray-client-server-port={self.client_port}",
        )  # fmt: skip
        self.wait_for_alive(1)
        self.rollout_node = self.add("rollout")
        self.wait_for_alive(2)
        self.reward_node = self.add("reward")
        self.wait_for_alive(3)

    def wait_for_alive(self, num_nodes: int) -> float:
        """Seconds until the head counts `num_nodes`; what the nodes said is shown when it fails."""

        def is_settled() -> bool:
            return self.num_alive() == num_nodes or not self.nodes[-1].is_up

        waited_s = wait_for(is_settled, f"{num_nodes} nodes alive", START_S, self.story)
        assert self.nodes[-1].is_up, f"a node ended while it started\n{self.story()}"
        return waited_s

    def add(self, pool: str) -> Node:
        return self._start(pool, f"--address={HEAD}:{self._gcs_port}")

    def _start(self, pool: str, *arguments: str) -> Node:
        log = self._logs / f"{pool}-{len(self.nodes)}.log"
        address = f"127.0.0.{2 + len(self.nodes)}"
        node = Node(address, [f"--labels=pool={pool}", *arguments], self.environment, log)
        self._stack.callback(node.kill)
        self.nodes.append(node)
        return node

    def num_alive(self) -> int:
        """Nodes that the head holds to be alive; 0 while its dashboard does not answer."""
        try:
            return sum(node["state"] == "ALIVE" for node in self.state("nodes"))
        except (httpx.HTTPError, ValueError, TypeError, KeyError):  # not up, or not ready to say
            return 0

    def state(self, what: str) -> list[dict[str, Any]]:
        """`nodes` or `actors`, from the head's state API."""
        token = Path(self.environment[ray_token.TOKEN_PATH]).read_text()
        reply = httpx.get(
            f"{self.dashboard}/api/v0/{what}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
        )
        reply.raise_for_status()
        return reply.json()["data"]["result"]["result"]

    def story(self) -> str:
        """How many nodes live, and the last that each has said."""
        said = [f"{node.log.name}, up {node.is_up}:\n{tail(node.log)}" for node in self.nodes]
        return "\n".join([f"{self.num_alive()} of {len(self.nodes)} nodes alive", *said])

    @property
    def exporters(self) -> list[str]:
        """URLs of the metrics of every living node."""
        return [f"http://127.0.0.1:{n.metrics_port}/metrics" for n in self.nodes if n.is_up]

    @property
    def pids(self) -> list[int]:
        """Of all nodes and of Redis."""
        return [self.redis_pid, *[pid for node in self.nodes for pid in node.pids]]


@contextmanager
def three_nodes(place: Path) -> Iterator[ThreeNodes]:
    """The cluster, with its token in a file of its own and its Redis in the environment."""
    token = place / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with ExitStack() as stack:
        short = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
        )
        stack.callback(_end_all, place)
        server = stack.enter_context(EmbeddedRedis(place / "redis"))
        environment = (
            os.environ
            | PATIENCE
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
        nodes = ThreeNodes(stack, place, environment, server.pid)
        nodes.start(short)
        yield nodes


def _end_all(place: Path) -> None:
    """What the nodes left behind: all of it knows the token's place, or works below it."""
    for pid in processes_of(place):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class SubmittedRun:
    """The quickstart, reduced, handed over by `hone submit` as a user types it."""

    def __init__(self, nodes: ThreeNodes, runs: Path, *overrides: str) -> None:
        runs.mkdir()
        self.nodes = nodes
        self.dir = RunDir(runs / "demo")
        self.log = runs / "submit.log"
        with self.log.open("wb") as output:
            self.job = subprocess.Popen(
                [HONE, "submit", QUICKSTART, "--address", nodes.dashboard, "--run", "demo", *SMALL,
                 LABELS, f"run.dir={runs}", *overrides],
                cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env=nodes.environment | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    @property
    def step(self) -> int:
        return max((int(row["step"]) for row in self.dir.read_metrics()), default=-1)

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return JsonLines(self.dir.ledger).read(dict[str, Any])

    def count(self, kind: str, actor: str) -> int:
        """Events of one kind about one actor."""
        events = self.dir.read_events()
        return sum(e.kind == kind and e.fields.get("actor") == actor for e in events)

    def wait_for(self, done: Callable[[], bool], what: str, deadline_s: float) -> float:
        """Seconds until `done`, which the run has to live to see."""
        waited_s = wait_for(
            lambda: done() or self.job.poll() is not None, what, deadline_s, self.story
        )
        assert self.job.poll() is None, (
            f"`hone submit` ended with {self.job.returncode} before {what}\n{self.story()}"
        )
        return waited_s

    def story(self) -> str:
        """What a person would look at: the phase, the last events, what was printed."""
        state = status.read(self.dir.path)
        known = "no status yet"
        if state is not None:
            known = f"{state.phase} {state.phase_detail}, step {state.step}; {state.error}"
            known += "".join(f"\n  {event}" for event in state.last_events)
            known += "".join(f"\n  {actor.name}: {actor.state}" for actor in state.actors)
        return f"{known}\n`hone submit`:\n{tail(self.log)}\n{self.nodes.story()}"

    def close(self) -> None:
        self.job.kill()
        self.job.wait(30)


def tail(file: Path, size: int = 3000) -> str:
    return file.read_text(errors="replace")[-size:] if file.exists() else "nothing"


def wait_for(
    done: Callable[[], bool], what: str, deadline_s: float, story: Callable[[], str] = str
) -> float:
    """Seconds until `done`; past the deadline it fails with `what` and the `story` so far."""
    started = time.monotonic()
    while not done():
        if time.monotonic() - started > deadline_s:
            raise AssertionError(f"no {what} in {deadline_s:.0f} s\n{story()}")
        time.sleep(POLL_S)
    return time.monotonic() - started
