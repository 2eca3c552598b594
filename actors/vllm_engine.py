"""One vLLM engine: token-in/token-out generation, scoring, and weight updates in flight.

Invariant: every sampled token carries its temperature-scaled log-prob and the policy version that
made it, and a prefix cached under one set of weights is never read under another (requests are
salted with the number of loads: a version number comes back when lost steps are repeated). Owned by
a rollout worker; the only module besides `weight_transfer` that imports vllm.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import utils as engine_processes
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from actors.placement import EngineSettings
from actors.rollout import Completion, Sampling
from actors.weight_transfer import BACKEND
from cluster.errors import StageError
from cluster.types import Author, Segment, TrajectoryStatus, VersionSpan

GIB = 2**30
MIN_BATCH_TOKENS = 2048
LOOK_S = 0.5  # how soon a dead engine is noticed


def start_processes_in(context: Callable[[], BaseContext]) -> None:
    """Have the processes of engines that are made here from now on started in `context`. vLLM by
    itself can only fork this one or spawn a new one, and does the latter in a Ray actor.
    """
    engine_processes.get_mp_context = context  # pyright: ignore[reportPrivateImportUsage]


class VllmEngine:
    """`AsyncLLM` behind the few calls Hone needs. Times in seconds, log-probs in nats."""

    def __init__(
        self, settings: EngineSettings, kind: type[AsyncLLM] = AsyncLLM, **overrides: Any
    ) -> None:
        self._engine = kind.from_engine_args(_engine_args(settings, overrides))
        self._request_ids = 0
        self._num_loads = 0
        self._halted_at: float | None = None  # since when it may not have generated
        self.policy_version = 0

    async def start(self) -> None:
        """Open the weight transfer and pay the first-batch cost before anyone waits for it."""
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest())
        await self._engine.update_weight_version(str(self.policy_version))
        warm_up = Sampling(max_new_tokens=8, temperature=1.0, stop_token_ids=[], seed=0)
        await self.generate(np.arange(1, 9, dtype=np.int32), 8, warm_up)
        await self.score(np.arange(1, 9, dtype=np.int32))
        await self._engine.reset_prefix_cache()

    async def generate(self, context: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        """`n` completions of `context` [C]; requests live through weight updates."""
        parameters = SamplingParams(
            n=n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=sampling.stop_token_ids,
            seed=sampling.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(context, parameters)
        if len(output.outputs) != n:
            raise StageError("rollout", f"asked {n} completions, got {len(output.outputs)}")
        return [self._completion(part) for part in output.outputs]

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs [S-1] fp32 at temperature 1 of tokens 1.. of `token_ids` [S]; no cache is
        read.
        """
        parameters = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        output = await self._run(token_ids, parameters)
        return _logprobs(token_ids[1:], output.prompt_logprobs)

    async def join_broadcast(self, init_info: dict[str, Any]) -> None:
        """Make its workers members of a group over which weights come; see
        `actors.weight_transfer`. It generates nothing while it waits for the others.
        """
        self._halted_at = self._halted_at or time.monotonic()
        await self._unless_dead(
            self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info))
        )

    async def load_weights(self, update_info: dict[str, Any], policy_version: int) -> float:
        """Swap weights under running requests (pause keep); returns the pause in seconds, with
        that of attempts which failed before.
        """
        halted_at = self._halted_at = self._halted_at or time.monotonic()
        await self._unless_dead(self._swap(update_info, policy_version))
        self._halted_at = None
        return time.monotonic() - halted_at

    async def _swap(self, update_info: dict[str, Any], policy_version: int) -> None:
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        await self._engine.start_weight_update()
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        await self._engine.finish_weight_update(weight_version=str(policy_version))
        self.policy_version = policy_version
        self._num_loads += 1
        await self._engine.resume_generation()

    async def sleep(self) -> None:
        """Finish what runs, forget the KV cache and move the weights to the host, so that others
        may use the GPU; requests wait until `wake`. On a CPU nothing is moved.
        """
        await self._unless_dead(self._engine.sleep(level=1, mode="wait"))

    async def wake(self) -> None:
        """Take the memory back, with the weights as they were, and go on."""
        await self._unless_dead(self._engine.wake_up())
        if await self._engine.is_sleeping():
            raise StageError("rollout", "the engine does not wake up")

    async def _unless_dead(self, call: Coroutine[Any, Any, object]) -> None:
        """Await a control call: vLLM leaves the calls of an engine that has died waiting."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
                if self._engine.errored:
                    raise self._engine.dead_error
            task.result()
        finally:
            task.cancel()

    async def is_alive(self) -> bool:
        return not self._engine.errored

    def shutdown(self) -> None:
        self._engine.shutdown()

    async def _run(self, token_ids: np.ndarray, parameters: SamplingParams) -> RequestOutput:
        self._request_ids += 1
        request_id = f"request-{self._request_ids}"
        prompt: Any = {
            "prompt_token_ids": token_ids.tolist(),
            "cache_salt": f"load-{self._num_loads}",
        }
        last: RequestOutput | None = None
        try:
            async for output in self._engine.generate(prompt, parameters, request_id=request_id):
                last = output
        except asyncio.CancelledError:
            await self._engine.abort(request_id)
            raise
        if last is None:
            raise StageError("rollout", f"the engine ended {request_id} without an output")
        return last

    def _completion(self, output: CompletionOutput) -> Completion:
        token_ids = np.array(output.token_ids, dtype=np.int32)
        logprobs = _logprobs(token_ids, output.logprobs)
        spans = [
            VersionSpan(int(span.version), span.start, span.end)
            for span in output.weight_versions or []
        ]
        is_completed = output.finish_reason == "stop"
        return Completion(
            segment=Segment(
                token_ids=token_ids, logprobs=logprobs, author=Author.POLICY, version_spans=spans
            ),
            status=TrajectoryStatus.COMPLETED if is_completed else TrajectoryStatus.TRUNCATED,
        )


def _logprobs(token_ids: np.ndarray, found: object) -> np.ndarray:
    """Log-probs [L] fp32 of `token_ids` [L], for which alone the engine was asked."""
    assert isinstance(found, FlatLogprobs)
    if found.token_ids != token_ids.tolist():
        raise StageError("rollout", "the engine's log-probs are of other tokens than it returned")
    return np.array(found.logprobs, dtype=np.float32)


def _engine_args(settings: EngineSettings, overrides: dict[str, Any]) -> AsyncEngineArgs:
    common: dict[str, Any] = {
        "model": str(settings.policy_dir),
        "dtype": settings.dtype,
        "max_model_len": settings.context_length,
        "seed": secrets.randbits(31),  # of requests without one: no two engines draw the same
        "max_num_seqs": settings.max_num_seqs,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        **overrides,
    }
    if settings.is_gpu:
        return AsyncEngineArgs(
            **common,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_fraction,
            enable_sleep_mode=settings.can_sleep,
        )
    return AsyncEngineArgs(
        **common,
        enforce_eager=True,
        # One process for scheduler and model: half the start time of the default on CPU.
        distributed_executor_backend=UniProcExecutor,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * GIB),
        # vLLM rewinds the generator of a seeded request whose prompt it splits over two batches;
        # CPU generators cannot be rewound, and the engine dies ("does not use offset").
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(MIN_BATCH_TOKENS, settings.context_length),
    )
