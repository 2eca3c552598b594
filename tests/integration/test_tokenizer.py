"""The tiny policy's tokenizer, rendering, and the prepared policy directory."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import time_to_accuracy
from cluster import config_file
from cluster.config import GgufPolicy, PretrainedPolicy, TinyPolicy
from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from cluster.types import Message
from learners.policy_dir import prepare
from learners.tokenizer import encode_completion, load_tokenizer, render, train_tokenizer
from rewards.tasksets import load_tasks

TEXTS = [f"What is {a} plus {b}? The answer is {a + b}." for a in range(30) for b in range(30)]
TINY = TinyPolicy(type="tiny", hidden_size=32, num_layers=1, num_heads=2, context_length=64)


def test_digits_are_tokens_of_their_own_and_any_text_survives() -> None:
    tokenizer = train_tokenizer(TEXTS, 320)
    ids = tokenizer.encode("12 plus 2026", add_special_tokens=False)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == ["1", "2", "2", "0", "2", "6"]
    for text in ("What is 3 plus 4?", "naïve ∑ 漢字 🙂\n\ttabs", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2, "merges shorten the task texts"


def test_the_sums_of_the_accuracy_study_fit_their_context() -> None:
    config = config_file.load(time_to_accuracy.CONFIG)
    assert isinstance(config.policy, TinyPolicy)
    tasks = load_tasks(config.tasks, "train")
    texts = [text for t in tasks for text in (t.messages[0].content, t.solution)]
    tokenizer = train_tokenizer(texts, config.policy.vocab_size)
    longest = max(len(encode_completion(tokenizer, task.solution)) for task in tasks)
    prompt = max(len(render(tokenizer, task.messages)) for task in tasks)
    assert longest < config.rollout.max_new_tokens
    assert prompt + config.rollout.max_new_tokens <= config.policy.context_length


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.vocab_size must be at least 258.*got 100"):
        train_tokenizer(TEXTS, 100)


def test_the_tiny_directory_loads_renders_and_repeats(tmp_path: Path) -> None:
    directory = prepare(TINY, TEXTS, tmp_path / "cache", tmp_path / "policy", seed=3)
    tokenizer = load_tokenizer(directory)
    messages = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="What is 1 plus 1?"),
    ]
    context = render(tokenizer, messages)
    assert tokenizer.decode(context) == "Be brief.\nWhat is 1 plus 1?\n"
    completion = encode_completion(tokenizer, "2")
    assert completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion, skip_special_tokens=True) == "2"

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.head_dim in (32, 64), "head sizes that vLLM has on CPU"
    assert model.config.eos_token_id == tokenizer.eos_token_id

    again = prepare(TINY, TEXTS, tmp_path / "cache", tmp_path / "again", seed=3)
    other = prepare(TINY, TEXTS, tmp_path / "cache", tmp_path / "other", seed=4)
    weights = (directory / "model.safetensors").read_bytes()
    assert weights == (again / "model.safetensors").read_bytes()
    assert weights != (other / "model.safetensors").read_bytes()
    assert (directory / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def test_prepare_keeps_what_is_there(tmp_path: Path) -> None:
    directory = prepare(TINY, TEXTS, tmp_path / "cache", tmp_path / "policy", seed=3)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert prepare(TINY, ["other"], tmp_path / "cache", tmp_path / "policy", seed=9) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"], "nothing half made is left"


def test_a_template_free_tokenizer_renders_one_message_a_line(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.chat_template = None
    context = render(tokenizer, [Message(role="user", content="a"), Message(role="x", content="b")])
    assert tokenizer.decode(context) == "a\nb\n"


def test_missing_models_name_the_knob(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        (PretrainedPolicy(type="pretrained", model=str(tmp_path / "empty")), r"policy\.model"),
        (GgufPolicy(type="gguf", package="no_such_package", file="a.gguf"), r"policy\.package"),
        (GgufPolicy(type="gguf", package="json", file="a.gguf"), r"policy\.file.*none"),
    ]
    for policy, message in cases:
        with pytest.raises(ConfigError, match=message):
            prepare(policy, [], tmp_path / "cache", tmp_path / "policy")


def test_a_hub_model_is_fetched_to_where_all_nodes_of_a_cluster_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []

    def fetch(model: str, *, cache_dir: Path | None, allow_patterns: list[str]) -> str:
        asked.append(cache_dir)
        return str(tmp_path / model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    policy = PretrainedPolicy(type="pretrained", model="someone/a-model")
    alone = RunDir.create(tmp_path / "alone", "demo", "run: {}\n", exist_ok=False)
    assert alone.models is None
    on_cluster = RunDir.create(tmp_path / "runs", "demo", "run: {}\n", exist_ok=False)
    on_cluster.share_weights()
    for run in (alone, on_cluster):
        prepare(policy, [], tmp_path / "cache", run.policy, models=run.models)
    assert asked == [None, tmp_path / "runs" / ".models"]
    assert RunDir(tmp_path / "runs" / "next").models == asked[1], "kept for other runs"
