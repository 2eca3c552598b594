"""Warm start: the tiny policy learns worked solutions, the same for any packing."""

from pathlib import Path

import numpy as np
import pytest

from cluster.config import Config
from cluster.config_file import parse
from cluster.errors import ConfigError
from cluster.types import Message
from learners.learner import Learner
from learners.policy_dir import prepare
from learners.records import Example, ScoreRequest, WarmStartProgress
from learners.tokenizer import encode_completion, load_tokenizer, render

PAIRS = [(a, b) for a in range(10) for b in range(10)]


def _config(microbatch_tokens: int = 1024) -> Config:
    return parse(
        {
            "policy": {
                "type": "tiny",
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 2,
                "context_length": 32,
            },
            "warm_start": {"examples": 100, "steps": 150, "batch_size": 50, "lr": 5e-3},
            "tasks": {"train": {"use": "unused"}},
            "rollout": {"max_new_tokens": 8},
            "rewards": {"verifiers": {"correct": {"use": "unused"}}},
            "learner": {"microbatch_tokens": microbatch_tokens},
            "resources": {"accelerator": "cpu"},
        },
        "test",
    )


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policy")
    texts = [f"{a}+{b}= {a + b}" for a, b in PAIRS]
    return prepare(_config().policy, texts, root / "cache", root / "tiny", seed=1)


@pytest.fixture(scope="module")
def examples(policy_dir: Path) -> list[Example]:
    tokenizer = load_tokenizer(policy_dir)
    return [
        (
            render(tokenizer, [Message(role="user", content=f"{a}+{b}=")]),
            encode_completion(tokenizer, f"{a + b}"),
        )
        for a, b in PAIRS
    ]


def _learner(config: Config, policy_dir: Path) -> Learner:
    return Learner(config=config, policy_dir=policy_dir, rank=0, world_size=1, num_threads=1)


def test_it_learns_the_completions(policy_dir: Path, examples: list[Example]) -> None:
    learner = _learner(_config(), policy_dir)
    try:
        progress = list(learner.warm_start(examples))
        requests = [ScoreRequest([*c, *s], len(c)) for c, s in examples]
        scores = learner.score(requests)
        assert learner.policy_version == 0
    finally:
        learner.close()
    assert [p.step for p in progress] == [*range(1, 151)]
    assert all(p.steps == 150 for p in progress)
    assert progress[0].loss == pytest.approx(np.log(300), abs=0.8), "starts near uniform"
    assert progress[-1].loss < 0.7
    measured = -np.concatenate(scores).mean()
    assert measured < 0.7, "context tokens never counted: the score is of completions only"


def test_packing_changes_nothing(policy_dir: Path, examples: list[Example]) -> None:
    curves: list[list[WarmStartProgress]] = []
    for microbatch_tokens in (32, 1024):
        learner = _learner(_config(microbatch_tokens), policy_dir)
        try:
            steps = learner.warm_start(examples)
            curves.append([next(steps) for _ in range(4)])
        finally:
            learner.close()
    for small, large in zip(*curves, strict=True):
        assert small.loss == pytest.approx(large.loss, abs=1e-4)


def test_nothing_to_learn_from_is_an_error(policy_dir: Path) -> None:
    learner = _learner(_config(), policy_dir)
    try:
        with pytest.raises(ConfigError, match=r"warm_start: .* solution or a reference"):
            next(learner.warm_start([]))
    finally:
        learner.close()
