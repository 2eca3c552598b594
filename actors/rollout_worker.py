"""The rollout actor: one engine, one tokenizer, one program.

Invariant: it never serves weights it cannot name: each trajectory says which policy version wrote
each token. Created by `actors.fleet`. All calls share one event loop, because the engine is bound
to it (Ray would give each concurrency group a loop of its own); the loop never blocks, so a
health check or a weight update does not queue behind long generations.
"""

import asyncio
import os
from typing import Any

import numpy as np
from ray.actor import exit_actor

from actors import engine_imports
from actors.placement import EngineSettings
from actors.programs import PROGRAMS
from actors.rollout import Completion, RolloutProgram, RolloutRequest, Sampling
from cluster import log, plugins, traces, wire
from cluster.config import Plugin
from cluster.errors import StageError, boundary
from cluster.types import Message


class RolloutWorker:
    """Runs inside its own Ray actor process; see `actors.placement` for its resources."""

    def __init__(self, program: Plugin, run_dir: str) -> None:
        self._run_dir = run_dir
        self._program: RolloutProgram = plugins.build(
            program.use, program.settings, PROGRAMS, "rollout.program.use"
        )
        self._is_worker = False
        self._engine: Any = None
        self._tokenizer: Any = None
        self._context_length = 0

    async def prepare(self, is_under_way: bool = False) -> None:
        """Stand by: returns when all imports of `start` are done. Where the node has no memory to
        spare for what is not under way yet the actor leaves.
        """
        if not is_under_way and not engine_imports.has_room():
            exit_actor()
        with boundary("rollout"):
            await asyncio.to_thread(engine_imports.prepare, engine_imports.PATIENT)

    async def stands_by(self) -> bool:
        """Prepared or being so, and no worker yet."""
        return not self._is_worker

    async def start(self, index: int, settings: EngineSettings) -> int:
        """Become worker `index` and load the engine (the long part: importing vllm); returns the
        process id.
        """
        self._is_worker = True
        log.setup(f"rollout-{index}", self._run_dir)
        with boundary("rollout"):
            self._engine, self._tokenizer = await asyncio.to_thread(_load, settings)
            self._context_length = settings.context_length
            await self._engine.start()
        return os.getpid()

    async def rollout(self, request: RolloutRequest) -> bytes:
        """Produce one group; the encoded `TrajectoryGroup`."""
        has_had = traces.span("rollout", request.group_id, hint_level=request.hint_level)
        with boundary("rollout"), has_had:
            io = EngineIO(self._engine, self._tokenizer, request.sampling, self._context_length)
            return wire.encode(await self._program.run(request, io))

    async def join_broadcast(self, init_info: dict[str, Any]) -> None:
        """Become a member of the group over which the learner sends weights."""
        with boundary("sync"):
            await self._engine.join_broadcast(init_info)

    async def load_weights(self, update_info: dict[str, Any], policy_version: int) -> float:
        """Swap weights in flight; returns the pause in seconds."""
        with boundary("sync"):
            pause_s = await self._engine.load_weights(update_info, policy_version)
        log.set_progress(policy_version=policy_version)
        return pause_s

    async def sleep(self) -> None:
        """Leave the GPU to the learner, until `wake`."""
        with boundary("rollout"):
            await self._engine.sleep()

    async def wake(self) -> None:
        with boundary("rollout"):
            await self._engine.wake()

    async def score(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of each sequence's tokens after the first, by the current weights."""
        with boundary("sync"):
            return await asyncio.gather(*[self._engine.score(s) for s in sequences])

    async def ping(self) -> int:
        """The policy version in service; raises when the engine process is gone."""
        if not await self._engine.is_alive():
            raise StageError("rollout", "the vLLM engine process is gone")
        return self._engine.policy_version

    async def stop(self) -> None:
        """End the engine process before the actor goes."""
        if self._engine is not None:
            self._engine.shutdown()


class EngineIO:
    """`RolloutIO` over one engine."""

    def __init__(
        self, engine: Any, tokenizer: Any, sampling: Sampling, context_length: int
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self.sampling = sampling
        self.context_length = context_length

    def render(self, messages: list[Message]) -> np.ndarray:
        from learners.tokenizer import render

        return np.array(render(self._tokenizer, messages), dtype=np.int32)

    def decode(self, token_ids: np.ndarray) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    async def generate(self, context: np.ndarray, n: int) -> list[Completion]:
        return await self._engine.generate(context, n, self.sampling)


def _load(settings: EngineSettings) -> tuple[Any, Any]:
    if not settings.is_gpu:
        engine_imports.prepare()
    from transformers import AutoTokenizer

    from actors.vllm_engine import VllmEngine

    return VllmEngine(settings), AutoTokenizer.from_pretrained(settings.policy_dir)
