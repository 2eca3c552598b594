"""Requests that run while weights change, and whether each of them came through whole.

Invariant: an answer counts as honest only when its spans cover all of its tokens without a gap, and
its `model` names a version that sampled some of them.
Used by `benchmarks.show_serve` and the end-to-end test of a live run.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

PROMPT = "12 + 34 ="
MAX_FAILED = 100  # then it is known


@dataclass
class Traffic:
    """What became of the requests. `num_cut` ended before their token limit, `num_crossed` were
    sampled by two versions or more, across a load.
    """

    num_requests: int = 0
    num_failed: int = 0
    num_cut: int = 0
    num_dishonest: int = 0
    num_crossed: int = 0
    versions: set[int] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.num_failed == self.num_cut == self.num_dishonest == 0

    def __str__(self) -> str:
        return (
            f"{self.num_failed} failed, {self.num_cut} truncated, {self.num_dishonest} without "
            f"whole spans or misnamed; {len(self.versions)} versions answered, {self.num_crossed} "
            "answers span two or more"
        )

    def add(self, answer: Any, tokens: int) -> None:
        """Count one whole answer of the official client, asked for exactly `tokens` tokens."""
        spans: list[dict[str, int]] = answer.policy_versions
        ends = [0, *[span["end"] for span in spans]]
        starts = [span["start"] for span in spans]
        sampled = {span["policy_version"] for span in spans}
        num_tokens = answer.usage.completion_tokens
        is_whole = starts == ends[:-1] and ends[-1] == num_tokens
        is_named = answer.model in {f"policy@{version}" for version in sampled}
        self.num_cut += num_tokens != tokens
        self.num_dishonest += not (is_whole and is_named)
        self.num_crossed += len(sampled) > 1
        self.versions |= sampled


def send(
    url: str,
    key: str,
    count: int,
    *,
    is_enough: Callable[[], bool] = lambda: True,
    clients: int = 32,
    tokens: int = 64,
    timeout_s: float = 400.0,
) -> Traffic:
    """At least `count` requests, and more until `is_enough`; stops at `timeout_s` or when
    `MAX_FAILED` have failed.
    """
    return asyncio.run(_send(url, key, count, is_enough, clients, tokens, timeout_s))


async def _send(
    url: str,
    key: str,
    count: int,
    is_enough: Callable[[], bool],
    clients: int,
    tokens: int,
    timeout_s: float,
) -> Traffic:
    traffic = Traffic()
    deadline = time.monotonic() + timeout_s

    async def client(asking: openai.AsyncOpenAI) -> None:
        while time.monotonic() < deadline and traffic.num_failed < MAX_FAILED:
            if traffic.num_requests >= count and is_enough():
                return
            traffic.num_requests += 1
            try:
                answer = await asking.completions.create(
                    model="policy", prompt=PROMPT, max_tokens=tokens, temperature=1.0,
                    seed=traffic.num_requests, extra_body={"ignore_eos": True},
                )  # fmt: skip
            except openai.OpenAIError as error:
                traffic.num_failed += 1
                traffic.failures.append(str(error))
            else:
                traffic.add(answer, tokens)

    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300
    ) as asking:
        await asyncio.gather(*[client(asking) for _ in range(clients)])
    return traffic
