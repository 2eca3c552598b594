"""Load on an OpenAI-compatible endpoint, and plain `vllm serve` to compare with.

Both sides get the same client, prompts and engine arguments. Used by `benchmarks.show_serve`.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


def measure(url: str, key: str, model: str, quick: bool) -> dict[int, Load]:
    per_client = {1: 8, 8: 6, 64: 2} if quick else {1: 24, 8: 16, 64: 6}
    asyncio.run(_load(url, key, model, 8, 2))  # the first batches pay for warming up
    return {c: asyncio.run(_load(url, key, model, c, n)) for c, n in per_client.items()}


async def _load(url: str, key: str, model: str, clients: int, per_client: int) -> Load:
    """`clients` at once, each asking `per_client` times for a streamed answer of 64 tokens."""
    firsts: list[float] = []
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 1.0,
            "ignore_eos": True, "stream": True}  # fmt: skip

    async def client(session: aiohttp.ClientSession) -> None:
        for _ in range(per_client):
            started = time.monotonic()
            is_first = True
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if is_first and line.startswith(b"data: "):
                        firsts.append(time.monotonic() - started)
                        is_first = False

    headers = {"Authorization": f"Bearer {key}"}
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
