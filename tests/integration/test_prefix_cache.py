"""A prefix that was cached under other weights is never read; without the salt it would be."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from actors.placement import Placement
from actors.rollout import Sampling
from actors.vllm_engine import VllmEngine
from cluster.config import Config
from learners.policy_dir import prepare

CONTEXT_LENGTH = 512
CONTEXT = np.random.default_rng(0).integers(5, 100, 400).astype(np.int32)  # some blocks of a cache


@pytest.fixture(scope="module")
def policy_dir(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("long")
    policy = tiny_config.policy.model_copy(update={"context_length": CONTEXT_LENGTH})
    return prepare(policy, ["1 plus 2 is 3"] * 20, root / "cache", root / "policy")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(tiny_config: Config, policy_dir: Path) -> AsyncIterator[VllmEngine]:
    settings = Placement.of(tiny_config).engine_settings(policy_dir)
    engine = VllmEngine(replace(settings, context_length=CONTEXT_LENGTH))
    await engine.start()
    yield engine
    engine.shutdown()


async def load(engine: VllmEngine, policy_dir: Path, version: int) -> None:
    """Weights of their own for each version."""
    torch.manual_seed(version)
    weights = load_file(policy_dir / "model.safetensors")
    path = policy_dir / f"version-{version}.safetensors"
    save_file({name: w + 0.1 * torch.randn_like(w) for name, w in weights.items()}, path)
    await engine.load_weights({"path": str(path)}, version)


async def error(engine: VllmEngine) -> float:
    """Of a completion's log-probs, against those that the engine computes without any cache."""
    [completion] = await engine.generate(CONTEXT, 1, Sampling(8, 1.0, [], 3))
    ours = completion.segment
    scored = await engine.score(np.concatenate([CONTEXT, ours.token_ids]))
    return float(np.abs(scored[-len(ours.token_ids) :] - ours.logprobs).max())


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prefix_of_other_weights_is_not_read(engine: VllmEngine, policy_dir: Path) -> None:
    assert await error(engine) < 1e-4
    for version in (1, 2):
        await load(engine, policy_dir, version)
        assert await error(engine) < 1e-4
    num_loads = engine._num_loads
    await load(engine, policy_dir, 3)
    engine._num_loads = num_loads  # the salt that requests had under the weights before
    assert await error(engine) > 1e-2, "the cache must have something to forget"
