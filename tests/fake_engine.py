"""What the engine pool asks of an engine, without vLLM: loads and starts wait for a test's word."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.openai_reply import Api, Reply, Trace
from cluster.errors import StageError
from cluster.types import VersionSpan


class FakeEngine:
    """Holds a version. `goes_on` cleared holds its loads up half-way, and its answers but `quick`
    ones.
    """

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.is_paused = False
        self.is_finite = True
        self.is_over = False
        self.loaded: list[int] = []
        self.policy_version = -1

    async def relabel(self, policy_version: int) -> None:
        self.policy_version = policy_version

    async def load_weights(self, update_info: dict[str, Any], policy_version: int) -> float:
        """Cancelled half-way it stays paused, as a real one would."""
        if self.is_paused:
            raise StageError("endpoint", "a weight update is under way already")
        self.is_paused = True
        await self.goes_on.wait()
        self.policy_version = policy_version
        self.loaded.append(policy_version)
        self.is_paused = False
        return 0.0

    async def probe(self, token_ids: np.ndarray) -> bool:
        return self.is_finite

    async def is_alive(self) -> bool:
        return not self.is_over

    async def respond(self, api: Api, body: dict[str, Any], model: str, trace: Trace) -> Reply:
        """One token, of the version that the engine holds when it goes on."""
        if not body.get("quick"):
            await self.goes_on.wait()
        trace.spans[0] = [VersionSpan(self.policy_version, 0, 1)]
        trace.num_output_tokens += 1
        return Reply(200, {"model": model, "policy_versions": trace.as_json()})

    def shutdown(self) -> None:
        self.is_over = True


class Starter:
    """Starts fake engines, each as soon as `goes_on` is set."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.num_begun = 0
        self.problem = ""
        self.engines: list[FakeEngine] = []

    async def start(self, *_settings: object) -> Any:
        self.num_begun += 1
        await self.goes_on.wait()
        if self.problem:
            raise StageError("endpoint", self.problem)
        self.engines.append(FakeEngine())
        return self.engines[-1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (nobody sets an event for it)
            await asyncio.sleep(0)
