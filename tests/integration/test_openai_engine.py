"""The endpoint's engine: what a weight update that fails half-way leaves behind."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from actors.openai_engine import OpenAIEngine
from actors.openai_reply import Trace
from actors.placement import Placement
from cluster.config import Config
from cluster.errors import StageError

ASKED = {"prompt": "1 + 2 =", "max_tokens": 60, "temperature": 0.0, "ignore_eos": True,
         "logprobs": 0}  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(tiny_config: Config, tiny_policy_dir: Path) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAIEngine(Placement.of(tiny_config).engine_settings(tiny_policy_dir))
    await engine.start()
    yield engine
    engine.shutdown()


async def ask(engine: OpenAIEngine) -> dict[str, Any]:
    reply = await engine.respond("completion", dict(ASKED), "policy@1", Trace())
    assert reply.status == 200, reply.body
    return reply.body


@pytest.mark.asyncio(loop_scope="module")
async def test_a_failed_load_returns_to_the_version_before(
    engine: OpenAIEngine, tiny_policy_dir: Path
) -> None:
    """The file vanishes when the engine has given up its old weights already: a request that runs
    meanwhile waits, and ends as if nothing had happened.
    """
    await engine.load_weights({"path": str(tiny_policy_dir / "model.safetensors")}, 1)
    before = await ask(engine)
    running = asyncio.create_task(ask(engine))
    await asyncio.sleep(0.05)
    with pytest.raises(StageError, match="weights 2 did not load"):
        await engine.load_weights({"path": "/nowhere/policy.safetensors"}, 2)
    during, after = await running, await ask(engine)
    assert await engine.is_alive()
    for answer in (during, after):
        assert answer["choices"][0]["text"] == before["choices"][0]["text"]
        assert {span["policy_version"] for span in answer["policy_versions"]} == {1}
    assert engine.policy_version == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_deadline_is_no_answer(engine: OpenAIEngine) -> None:
    """vLLM tells a caller that is cancelled that its client has left."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await engine.respond("completion", ASKED | {"max_tokens": 100}, "policy@1", Trace())
    assert (await ask(engine))["usage"]["completion_tokens"] == 60


@pytest.mark.asyncio(loop_scope="module")
async def test_an_engine_that_cannot_go_back_is_not_alive(engine: OpenAIEngine) -> None:
    engine._held = ({"path": "/nowhere/old.safetensors"}, 1)
    with pytest.raises(StageError, match="nor did 1 again"):
        await engine.load_weights({"path": "/nowhere/policy.safetensors"}, 2)
    assert not await engine.is_alive()
