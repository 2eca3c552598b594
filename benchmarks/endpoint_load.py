"""Load on two OpenAI-compatible servers, to compare them.

Both sides run at the same time and are asked in turns, with the same client, prompts and engine
arguments. Used by `benchmarks.show_serve`.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import aiohttp

PROMPT = "12 + 34 ="
TOKENS = 64
ROUNDS, QUICK_ROUNDS = 9, 3


@dataclass(frozen=True)
class Load:
    """One load level, or the medians of several: tokens per second as the server counts them, and
    percentiles of the time to first token in seconds; all requests are counted.
    """

    num_requests: int
    tokens_per_s: float
    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class Paired:
    """Rounds in which both sides were asked, one right after the other.

    A round's ratio and difference share whatever else the machine did then, so medians are taken
    over these and not over each side by itself.
    """

    rounds: list[tuple[Load, Load]]  # ours, theirs

    @property
    def ours(self) -> Load:
        return _median([ours for ours, _ in self.rounds])

    @property
    def theirs(self) -> Load:
        return _median([theirs for _, theirs in self.rounds])

    @property
    def tokens_ratio(self) -> float:
        return median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in self.rounds)

    @property
    def extra_p50_s(self) -> float:
        return median(ours.p50_s - theirs.p50_s for ours, theirs in self.rounds)


@dataclass(frozen=True)
class Side:
    """One endpoint under comparison."""

    url: str
    key: str
    model: str


def compare(ours: Side, theirs: Side, quick: bool) -> Iterator[tuple[int, Paired]]:
    """Both sides by number of clients, in turns; which one is first changes every round."""
    per_client = {1: 8, 8: 4, 64: 1} if quick else {1: 16, 8: 8, 64: 3}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for side in (ours, theirs):
        asyncio.run(_load(side, 8, 2))  # the first batches pay for warming up
    for clients, count in per_client.items():
        pairs: list[tuple[Load, Load]] = []
        for number in range(rounds):
            order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            loads = {side: asyncio.run(_load(side, clients, count)) for side in order}
            pairs.append((loads[ours], loads[theirs]))
        yield clients, Paired(pairs)


def _median(loads: Sequence[Load]) -> Load:
    def middle(name: str) -> float:
        return median(getattr(load, name) for load in loads)

    num_requests = sum(load.num_requests for load in loads)
    return Load(num_requests, middle("tokens_per_s"), middle("p50_s"), middle("p99_s"))


async def _load(side: Side, clients: int, per_client: int) -> Load:
    """`clients` at once, each asking `per_client` times for a streamed answer of 64 tokens.

    Raises `RuntimeError` when a stream ends without its usage.
    """
    firsts: list[float] = []
    num_tokens = 0
    body = {"model": side.model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 1.0,
            "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal num_tokens
        for _ in range(per_client):
            started = time.monotonic()
            last = b""
            async with session.post(f"{side.url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        if not last:
                            firsts.append(time.monotonic() - started)
                        last = line
            num_tokens += _completion_tokens(last)

    headers = {"Authorization": f"Bearer {side.key}"}
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        started = time.monotonic()
        await asyncio.gather(*[client(session) for _ in range(clients)])
        elapsed = time.monotonic() - started
    firsts.sort()
    p99 = firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))]
    return Load(len(firsts), num_tokens / elapsed, firsts[len(firsts) // 2], p99)


def _completion_tokens(last_event: bytes) -> int:
    usage = json.loads(last_event.removeprefix(b"data: ") or b"{}").get("usage")
    if not usage:
        raise RuntimeError(f"a stream ended without its usage: {last_event[:200]!r}")
    return int(usage["completion_tokens"])


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
