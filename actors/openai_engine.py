"""One vLLM engine behind vLLM's own OpenAI serving layer, with weights that move under requests.

Invariant: every finished choice is traced to the policy versions that sampled its tokens, and no
request reads a prefix cached before the last weight update (requests are salted with the number of
updates). Owned by the policy endpoint; the rollout side uses `actors.vllm_engine` directly.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any, NoReturn

import numpy as np
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.outputs import RequestOutput
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from actors.openai_reply import Api, Reply, Trace
from actors.placement import EngineSettings
from actors.vllm_engine import VllmEngine
from cluster.errors import StageError
from cluster.types import VersionSpan

SERVED_NAME = "policy"
# What `learners.tokenizer.render` gives a tokenizer without a chat template.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

REQUESTS = {"chat": ChatCompletionRequest, "completion": CompletionRequest}  # what `respond` reads


_trace: ContextVar[Trace | None] = ContextVar("trace", default=None)


class _TracedLLM(AsyncLLM):
    """`AsyncLLM` that notes the spans of the requests of the current context."""

    num_updates = 0

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        if isinstance(prompt, dict):
            salt = f"{self.num_updates}:{prompt.get('cache_salt', '')}"
            prompt = {**prompt, "cache_salt": salt}
        outputs = super().generate(prompt, sampling_params, request_id, **options)
        trace = _trace.get()
        if trace is None:
            return outputs
        owed = 0
        if sampling_params.output_kind is RequestOutputKind.FINAL_ONLY:
            length = len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0
            owed = length + sampling_params.n * (sampling_params.max_tokens or 0)
        return _note(trace, outputs, sampling_params.n, owed)


async def _note(
    trace: Trace, outputs: AsyncGenerator[RequestOutput, None], n: int, owed: int
) -> AsyncGenerator[RequestOutput, None]:
    first = trace.num_choices
    trace.num_choices += n
    trace.num_owed_tokens += owed
    has_prompt = False
    try:
        async for output in outputs:
            trace.num_owed_tokens -= owed
            owed = 0
            if not has_prompt and output.prompt_token_ids is not None:
                has_prompt = True
                trace.num_prompt_tokens += len(output.prompt_token_ids)
            for part in output.outputs:
                trace.num_output_tokens += len(part.token_ids)
                if part.weight_versions is not None:
                    trace.spans[first + part.index] = [
                        VersionSpan(int(span.version), span.start, span.end)
                        for span in part.weight_versions
                    ]
            yield output
    except Exception:
        trace.has_failed = True
        trace.num_owed_tokens -= owed
        raise
    finally:
        await outputs.aclose()


class OpenAIEngine(VllmEngine):
    """Example: `await engine.respond("chat", body, "policy@7", trace)`."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(
            settings, _TracedLLM, skip_tokenizer_init=False, logprobs_mode="raw_logprobs"
        )
        self._held: tuple[dict[str, Any], int] | None = None  # what `load_weights` took last
        self._is_lost = False
        llm = self._engine
        paths = [BaseModelPath(name=SERVED_NAME, model_path=SERVED_NAME)]
        models = OpenAIServingModels(llm, paths)
        tokenizer = llm.renderer.tokenizer
        template = None if getattr(tokenizer, "chat_template", None) else PLAIN_TEMPLATE
        renderer = OnlineRenderer(
            llm.model_config,
            llm.renderer,
            request_logger=None,
            chat_template=template,
            chat_template_content_format="auto",
        )
        self._chat_api = OpenAIServingChat(
            llm,
            models,
            "assistant",
            online_renderer=renderer,
            request_logger=None,
            chat_template=template,
            chat_template_content_format="auto",
        )
        self._completion_api = OpenAIServingCompletion(
            llm, models, online_renderer=renderer, request_logger=None
        )

    async def load_weights(self, update_info: dict[str, Any], policy_version: int) -> float:
        """Swap weights under running requests, which stay paused until the engine holds one whole
        version: after a failure the one before, loaded again from its file.

        Raises `StageError` when it failed; an engine that could not go back is not alive any more.
        """
        try:
            pause_s = await super().load_weights(update_info, policy_version)
        except Exception as error:
            await self._go_back(policy_version, error)
        self._held = (update_info, policy_version)
        self._engine.num_updates += 1  # pyright: ignore[reportAttributeAccessIssue]
        return pause_s

    async def _go_back(self, failed: int, error: Exception) -> NoReturn:
        reason = f"weights {failed} did not load: {error}"
        if self._held is None:
            self._is_lost = True
            raise StageError("endpoint", reason) from error
        try:
            await super().load_weights(*self._held)
        except Exception as again:
            self._is_lost = True
            raise StageError(
                "endpoint", f"{reason}; nor did {self._held[1]} again: {again}"
            ) from error
        raise StageError("endpoint", reason) from error

    async def is_alive(self) -> bool:
        return not self._is_lost and await super().is_alive()

    async def relabel(self, policy_version: int) -> None:
        """Name the weights that the engine holds already."""
        self.policy_version = policy_version
        await self._engine.update_weight_version(str(policy_version))

    async def probe(self, token_ids: np.ndarray) -> bool:
        """Whether all log-probs of `token_ids` [S] are finite numbers."""
        return bool(np.isfinite(await self.score(token_ids)).all())

    async def respond(self, api: Api, body: dict[str, Any], model: str, trace: Trace) -> Reply:
        """Answer one request as `model`; errors come back as a reply with their status."""
        body = {**body, "model": SERVED_NAME}
        token = _trace.set(trace)
        try:
            if api == "chat":
                request = ChatCompletionRequest.model_validate(body)
                result = await self._chat_api.create_chat_completion(request)
            else:
                asked = CompletionRequest.model_validate(body)
                result = await self._completion_api.create_completion(asked)
        except ValidationError as error:
            return _refused(error)
        except Exception as error:
            failure = create_error_response(error)
            return Reply(failure.error.code, failure.model_dump())
        finally:
            _trace.reset(token)
        if isinstance(result, ErrorResponse):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError  # of which vLLM makes a refusal
            return Reply(result.error.code, result.model_dump())
        if isinstance(result, ChatCompletionResponse | CompletionResponse):
            whole = result.model_dump(mode="json")
            whole |= {"model": model, "policy_versions": trace.as_json()}
            return Reply(200, whole)
        return Reply(200, events=_stamped(result, model, trace))


def _refused(error: ValidationError) -> Reply:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"] if "[" not in str(part) and "(" not in str(part)]
    message = str(first["msg"]).removeprefix("Value error, ")
    param = ".".join(place[:3]) or None
    text = f"{param}: {message}" if param else message
    return Reply(400, {"error": {"message": text[:500], "param": param}})


async def _stamped(
    events: AsyncGenerator[str, None], model: str, trace: Trace
) -> AsyncGenerator[str, None]:
    """The events under the name `model`; the one that ends a choice tells its versions."""
    served, named = f'"model":"{SERVED_NAME}"', f'"model":{json.dumps(model)}'
    try:
        async for event in events:
            stamped = event.replace(served, named, 1)
            if '"finish_reason":"' in stamped:
                spans = json.dumps(trace.as_json(), separators=(",", ":"))
                stamped = f'{stamped.rstrip()[:-1]},"policy_versions":{spans}}}\n\n'
            yield stamped
    finally:
        await events.aclose()
