"""Load on an OpenAI-compatible endpoint, and plain `vllm serve` to compare with.

Both sides run at the same time and are asked in turns, with the same client, prompts and engine
arguments. Used by `benchmarks.show_serve`.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import aiohttp
import httpx

from actors.placement import QUIET_ENV

PROMPT = "12 + 34 ="
TOKENS = 64
START_S = 240.0


@dataclass(frozen=True)
class Load:
    """One load level: tokens per second, and percentiles of the time to first token in seconds."""

    tokens_per_s: float
    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class Side:
    """One endpoint under comparison."""

    url: str
    key: str
    model: str


def compare(ours: Side, theirs: Side, quick: bool) -> dict[int, tuple[Load, Load]]:
    """Both sides by number of clients, in turns, so that whatever else the machine does hits
    both; each figure is the median of its rounds.
    """
    per_client = {1: 8, 8: 4, 64: 1} if quick else {1: 16, 8: 8, 64: 3}
    rounds = 3 if quick else 5
    found: dict[int, tuple[Load, Load]] = {}
    for side in (ours, theirs):
        asyncio.run(_load(side, 8, 2))  # the first batches pay for warming up
    for clients, count in per_client.items():
        pairs: list[tuple[Load, Load]] = []
        for number in range(rounds):
            order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            loads = {side: asyncio.run(_load(side, clients, count)) for side in order}
            pairs.append((loads[ours], loads[theirs]))
        mine, others = zip(*pairs, strict=True)
        found[clients] = (_median(mine), _median(others))
    return found


def _median(loads: Sequence[Load]) -> Load:
    def middle(name: str) -> float:
        return median(getattr(load, name) for load in loads)

    return Load(middle("tokens_per_s"), middle("p50_s"), middle("p99_s"))


async def _load(side: Side, clients: int, per_client: int) -> Load:
    """`clients` at once, each asking `per_client` times for a streamed answer of 64 tokens."""
    firsts: list[float] = []
    body = {"model": side.model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 1.0,
            "ignore_eos": True, "stream": True}  # fmt: skip

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in range(per_client):
            started = time.monotonic()
            is_first = True
            async with session.post(f"{side.url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if is_first and line.startswith(b"data: "):
                        firsts.append(time.monotonic() - started)
                        is_first = False

    headers = {"Authorization": f"Bearer {side.key}"}
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        started = time.monotonic()
        await asyncio.gather(*[client(session) for _ in range(clients)])
        elapsed = time.monotonic() - started
    firsts.sort()
    p99 = firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))]
    total = TOKENS * clients * per_client
    return Load(total / elapsed, firsts[len(firsts) // 2], p99)


@contextmanager
def plain_vllm(policy_dir: Path) -> Generator[str]:
    """`vllm serve` with the engine arguments that the endpoint uses."""
    port = free_port()
    env = os.environ | QUIET_ENV
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(policy_dir),
         "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
         "--max-model-len", "128", "--max-num-seqs", "256", "--no-enable-chunked-prefill",
         "--max-num-batched-tokens", "2048", "--kv-cache-memory-bytes", str(2**28),
         "--distributed-executor-backend", "uni",
         "--disable-log-stats", "--disable-uvicorn-access-log"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _answers(url), START_S)
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {process.returncode}")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the endpoint did not get there")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
