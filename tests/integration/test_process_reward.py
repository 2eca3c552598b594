"""Process rewards with real models: the formats of public ones, training on Monte-Carlo values, and
a learner's step on their scores.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from benchmarks import process_reward
from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import (
    Message,
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    Verdict,
    VersionSpan,
)
from learners.process_credit import ProcessNormalized
from learners.tokenizer import encode_completion, load_tokenizer, render
from rewards.rubric import Rubric
from rewards.self_check import group_of
from rewards.step_format import DEFAULT_MARKER, StepFormat
from rewards.step_likelihood import StepLikelihood
from rewards.step_models import StepClassifier, StepTokenProbability
from rewards.steps import compile_separator, split_steps

TASK = Task(
    task_id="t", taskset="x", messages=[Message(role="user", content="4 - 1 - 7 =")], reference="-4"
)
TEXTS = ["4 - 1 = 3\n3 - 7 = -4\n-4", "4 - 1 = 2\n2 - 7 = -5\n-5", "-4"]
LINES = compile_separator(r"\n+")
STEPS = [split_steps(text, LINES) for text in TEXTS]


@pytest.fixture(scope="module")
def classifier_dir(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with an untrained head and a marker token."""
    place = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": [DEFAULT_MARKER, "<extra_0>"]})
    torch.manual_seed(0)
    model: Any = AutoModelForTokenClassification.from_pretrained(tiny_policy_dir, num_labels=2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def _group(policy_dir: Path, texts: list[str], task: Task = TASK) -> TrajectoryGroup:
    tokenizer = load_tokenizer(policy_dir)
    context = np.array(render(tokenizer, task.messages), dtype=np.int32)
    trajectories = []
    for i, text in enumerate(texts):
        tokens = np.array(encode_completion(tokenizer, text), dtype=np.int32)
        length = len(tokens)
        trajectories.append(
            Trajectory(
                trajectory_id=f"g/{i}",
                group_id="g",
                task_id=task.task_id,
                context_tokens=context,
                token_ids=tokens,
                loss_mask=np.ones(length, dtype=bool),
                rollout_logprobs=np.full(length, -1.0, dtype=np.float32),
                version_spans=[VersionSpan(0, 0, length)],
                status=TrajectoryStatus.COMPLETED,
                text=text,
            )
        )
    return TrajectoryGroup(group_id="g", task=task, trajectories=trajectories)


async def test_a_classifier_reads_its_marker_tokens_one_row_at_a_time_or_all_at_once(
    classifier_dir: Path,
) -> None:
    """Against the model's own forward pass over text written by hand, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(classifier_dir)
    model: Any = AutoModelForTokenClassification.from_pretrained(classifier_dir).eval()
    mark = tokenizer.convert_tokens_to_ids(DEFAULT_MARKER)
    expected = []
    for steps in STEPS:
        text = "4 - 1 - 7 =\n" + "".join(f"{step.strip()}{DEFAULT_MARKER}" for step in steps)
        tokens = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            right = model(tokens).logits[0].softmax(-1)[:, 1]
        expected.append(right[tokens[0] == mark].tolist())
    for batch_tokens in (1, 16384):
        scorer = StepClassifier(str(classifier_dir), batch_tokens=batch_tokens)
        scored = await scorer.score(TASK, STEPS)
        assert [len(s.scores) for s in scored] == [3, 3, 1]
        for result, scores in zip(scored, expected, strict=True):
            np.testing.assert_allclose(result.scores, scores, atol=1e-5)


async def test_qwen_math_prm_checkpoints_load_without_their_code(
    classifier_dir: Path, tmp_path: Path
) -> None:
    """Their head is Linear, ReLU, Linear under `score`; the class is named in the config only."""
    model: Any = AutoModelForTokenClassification.from_pretrained(classifier_dir)
    size = model.config.hidden_size
    torch.manual_seed(1)
    head = torch.nn.Sequential(
        torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 2)
    )
    model.config.architectures = ["Qwen2ForProcessRewardModel"]
    weights = load_file(classifier_dir / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.startswith("score.")}
    weights |= {f"score.{k}": v.detach() for k, v in head.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    AutoTokenizer.from_pretrained(classifier_dir).save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"Qwen3ForTokenClassification"', '"Qwen2ForProcessRewardModel"')
    )
    form = StepFormat(marker="<extra_0>")
    row = form.encode(AutoTokenizer.from_pretrained(tmp_path), TASK, STEPS[0])
    with torch.no_grad():
        hidden = model.eval().base_model(torch.tensor([row.token_ids])).last_hidden_state[0]
        expected = head(hidden[row.positions]).softmax(-1)[:, 1]
    scorer = StepClassifier(str(tmp_path), marker="<extra_0>")
    (scored,) = await scorer.score(TASK, STEPS[:1])
    np.testing.assert_allclose(scored.scores, expected, atol=1e-5)
    weights.pop("score.2.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"score\.2\.bias"):
        StepClassifier(str(tmp_path), marker="<extra_0>")


async def test_token_probabilities_at_a_marker_that_is_plain_text(tiny_policy_dir: Path) -> None:
    """Math-Shepherd's way: a word behind each step, and two tokens that say good or bad."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_policy_dir).eval()
    scorer = StepTokenProbability(
        str(tiny_policy_dir), marker=" ки", joiner="\n", question_format="{question} "
    )
    (scored,) = await scorer.score(TASK, STEPS[:1])
    text = "4 - 1 - 7 = "
    expected = []
    for i, step in enumerate(STEPS[0]):
        text += ("\n" if i else "") + f"{step.strip()} ки"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(text)])).logits[0, -1]
        pair = logits[[tokenizer.encode("+")[0], tokenizer.encode("-")[0]]]
        expected.append(pair.softmax(-1)[0].item())
    np.testing.assert_allclose(scored.scores, expected, atol=1e-5)
    with pytest.raises(ConfigError, match="good must be one token"):
        StepTokenProbability(str(tiny_policy_dir), marker=" ки", good="certainly")


@pytest.mark.parametrize("target", ["answer", "step"])
async def test_likelihood_is_the_mean_probability_of_the_target(
    tiny_policy_dir: Path, target: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_policy_dir).eval()
    (scored,) = await StepLikelihood(str(tiny_policy_dir), target=target).score(TASK, STEPS[:1])
    before = "4 - 1 - 7 =\n"
    least = 1.0
    for step, score in zip(STEPS[0], scored.scores, strict=True):
        after = before + step
        start, text = (before, step) if target == "step" else (after.rstrip("\n") + "\n", "-4")
        num_context = len(tokenizer.encode(start))
        tokens = torch.tensor([tokenizer.encode(start + text)])
        with torch.no_grad():
            logprobs = model(tokens).logits[0].log_softmax(-1)
        loss = functional.nll_loss(logprobs[num_context - 1 : -1], tokens[0, num_context:])
        least = min(least, (-loss).exp().item()) if target == "step" else (-loss).exp().item()
        assert score == pytest.approx(least, abs=1e-5)
        before = after


async def test_what_cannot_be_scored_abstains_and_what_is_wrong_is_refused(
    classifier_dir: Path, tiny_policy_dir: Path
) -> None:
    long = "\n".join(["4 - 1 = 3"] * 40)
    verifier = VerifierConfig(
        use="process",
        settings={"scorer": {"use": "classifier", "settings": {"model": str(classifier_dir)}}},
    )
    rubric = Rubric({"steps": verifier}, str(tiny_policy_dir))
    scored = await rubric.score(_group(tiny_policy_dir, [TEXTS[0], long]))
    first, second = (t.verdicts[0] for t in scored.trajectories)
    assert first.score is not None
    assert second.score is None
    assert "the model reads at most 128" in second.error
    for scorer, message in (
        ({"use": "classifier", "settings": {"model": str(tiny_policy_dir)}}, "no trained step"),
        ({"use": "classifier", "settings": {"model": "/nowhere"}}, "/nowhere"),
        ({"use": "classifer"}, "did you mean 'classifier'"),
        ({"use": "likelihood", "settings": {"model": "x", "target": "all"}}, "answer or step"),
    ):
        with pytest.raises(ConfigError, match=message):
            Rubric({"steps": VerifierConfig(use="process", settings={"scorer": scorer})})


async def test_other_weights_are_another_reward_version(classifier_dir: Path) -> None:
    settings = {"scorer": {"use": "classifier", "settings": {"model": str(classifier_dir)}}}
    config = VerifierConfig(use="process", settings=settings)
    before = Rubric({"steps": config}).versions["steps"]
    assert Rubric({"steps": config}).versions["steps"] == before
    weights = classifier_dir / "model.safetensors"
    original = weights.read_bytes()
    tensors = load_file(weights)
    tensors["score.weight"] = tensors["score.weight"] + 1
    save_file(tensors, weights)
    try:
        assert Rubric({"steps": config}).versions["steps"] != before
    finally:
        weights.write_bytes(original)


async def test_step_scores_reach_the_tokens_as_process_credit(tiny_policy_dir: Path) -> None:
    """Exact step scores at token ends; advantages fall behind the first wrong step."""
    verifier = VerifierConfig(use="process", settings={"scorer": {"use": "arithmetic"}}, weight=0)
    correct = VerifierConfig(use="math")
    rubric = Rubric({"correct": correct, "steps": verifier}, str(tiny_policy_dir))
    try:
        group = _group(tiny_policy_dir, [TEXTS[0], "4 - 1 = 3\n3 - 7 = -5\n-5", ""])
        scored = await rubric.score(group)
    finally:
        await rubric.close()
    tokenizer = load_tokenizer(tiny_policy_dir)
    verdicts = [t.verdicts[1] for t in scored.trajectories]
    assert [v.score for v in verdicts] == [1.0, 0.0, 0.0]
    assert [[s for _, s in v.step_scores] for v in verdicts] == [[1, 1, 1], [1, 0, 0], [0]]
    for trajectory, verdict in zip(scored.trajectories[:2], verdicts, strict=False):
        begin = 0
        steps = split_steps(trajectory.text, LINES)
        for step, (end, _) in zip(steps, verdict.step_scores, strict=True):
            said = tokenizer.decode(trajectory.token_ids[begin:end], skip_special_tokens=True)
            assert said == step
            begin = end
    right, wrong, empty = ProcessNormalized(signal="steps").assign(scored)
    assert right is not None
    assert wrong is not None
    assert empty is not None
    assert (right > 0).all()
    first = verdicts[1].step_scores[0][0]
    assert (wrong[first:] < 0).all()
    assert len(empty) == 1
    assert empty[0] < 0


def test_a_sample_whose_check_could_not_be_made_is_left_out_of_the_accuracies() -> None:
    task = Task(task_id="t", taskset="x", reference="2", messages=[], solution="2")
    group = group_of(task, ["2", "3", "2"])
    known = [
        msgspec.structs.replace(t, reward=reward)
        for t, reward in zip(group.trajectories, (1.0, 0.0, None), strict=True)
    ]
    given = msgspec.structs.replace(group, trajectories=known)
    verdicts = [Verdict(score=score, step_scores=[(1, score)]) for score in (0.5, 0.1, 0.9)]
    scored = msgspec.structs.replace(
        group,
        trajectories=[
            msgspec.structs.replace(t, verdicts=[verdict])
            for t, verdict in zip(known, verdicts, strict=True)
        ],
    )
    figures = process_reward._figures([scored], [[[True], [False], [True]]], [given])
    assert figures["best_of_n"] == 1.0
    assert figures["auc"] == 1.0
