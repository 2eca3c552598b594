"""Monte-Carlo step values by a real policy, and a process model that learns from step values."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config

from actors.rollout import Completion, RolloutRequest, Sampling, build_trajectory
from actors.step_estimates import StepEstimator, StepValues
from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import (
    Message,
    Segment,
    Task,
    TrajectoryGroup,
    TrajectoryStatus,
    Verdict,
    VersionSpan,
)
from learners.process_model import (
    ProcessModel,
    ProcessModelSettings,
    StepExample,
    auc,
    require_layers,
)
from learners.tokenizer import load_tokenizer, render
from rewards.base import VerifierIO
from rewards.rubric import Rubric
from rewards.step_models import StepClassifier

# An untrained policy writes anything; about every eighth token ends a step.
STEP_ENDS = re.compile("[ -@]")
TASK = Task(
    task_id="t", taskset="x", messages=[Message(role="user", content="4 + 2 =")], reference="6"
)
SAMPLING = Sampling(max_new_tokens=24, temperature=1.0, stop_token_ids=[1], seed=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost these small models minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pays(text: str) -> float | None:
    """1 for an even length; abstains on a "9"."""
    return None if "9" in text else float(len(text) % 2 == 0)


class EvenLength:
    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        return [Verdict(score=pays(t.text)) for t in group.trajectories]


class Sampler:
    """A policy that samples with transformers; it notes what it was asked."""

    def __init__(self, policy_dir: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(policy_dir)
        self.asked: list[tuple[list[int], int]] = []

    async def generate(self, context: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self.asked.append((context.tolist(), sampling.max_new_tokens))
        torch.manual_seed(hash((tuple(context.tolist()), sampling.seed)) % 2**31)
        output = self._model.generate(
            torch.tensor([context.tolist()] * n),
            do_sample=True,
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sampling.stop_token_ids,
            pad_token_id=0,
        )
        completions = []
        for row in output[:, len(context) :].numpy().astype(np.int32):
            ends = np.flatnonzero(np.isin(row, sampling.stop_token_ids))
            tokens = row[: ends[0] + 1] if len(ends) else row
            segment = Segment(
                token_ids=tokens,
                logprobs=np.zeros(len(tokens), np.float32),
                version_spans=[VersionSpan(0, 0, len(tokens))],
            )
            completions.append(Completion(segment, TrajectoryStatus.COMPLETED))
        return completions


async def test_step_values_are_shares_of_rewarded_continuations_and_own_outcomes(
    tiny_policy_dir: Path,
) -> None:
    tokenizer = load_tokenizer(tiny_policy_dir)
    sampler = Sampler(tiny_policy_dir)

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    context = np.array(render(tokenizer, TASK.messages), dtype=np.int32)
    request = RolloutRequest("g", TASK, 4, SAMPLING)
    completions = await sampler.generate(context, 4, SAMPLING)
    completions += completions[:1]  # an equal trace costs nothing more
    trajectories = [
        build_trajectory(
            request, i, context, [c.segment], c.status, decode(list(c.segment.token_ids))
        )
        for i, c in enumerate(completions)
    ]
    rubric = Rubric({"even": VerifierConfig(use=f"{__name__}:EvenLength", timeout_s=60)})
    try:
        group = await rubric.score(
            TrajectoryGroup(group_id="g", task=TASK, trajectories=trajectories)
        )
        sampler.asked.clear()
        estimator = StepEstimator(sampler, decode, rubric, SAMPLING, STEP_ENDS, 6)
        traces = await estimator.estimate(group)
        num_asked = len(sampler.asked)
        frugal = StepEstimator(sampler, decode, rubric, SAMPLING, STEP_ENDS, 0)
        alone = await frugal.estimate(group)
    finally:
        await rubric.close()
    assert num_asked == len(sampler.asked) == len({tuple(tokens) for tokens, _ in sampler.asked})
    for trace in alone:  # without continuations: the mean over traces that begin alike
        for i, value in enumerate(trace.values):
            begin = "".join(trace.steps[: i + 1])
            alike = [t.reward for t in group.trajectories if t.text.startswith(begin)]
            assert value is None or min(r for r in alike if r is not None) <= value <= 1.0
    traces, added = traces[:5], traces[5:]
    assert traces[4].values == traces[0].values
    num_checked = 0
    for trace, trajectory in zip(traces, group.trajectories, strict=True):
        assert "".join(trace.steps) == trajectory.text
        assert trace.values[-1] == trajectory.reward
        asked = {tuple(tokens): left for tokens, left in sampler.asked}
        for i, value in enumerate(trace.values[:-1]):
            begin = "".join(trace.steps[: i + 1])
            end = next(
                n
                for n in range(len(trajectory.token_ids) + 1)
                if decode(trajectory.token_ids[:n].tolist()).startswith(begin)
            )
            prefix = trajectory.token_ids[:end]
            tokens = np.concatenate([context, prefix])
            left = SAMPLING.max_new_tokens - end
            assert asked.get(tuple(tokens.tolist()), 0) == left
            if left == 0:
                continue
            again = await sampler.generate(tokens, 6, replace(SAMPLING, max_new_tokens=left))
            texts = [decode([*prefix.tolist(), *c.segment.token_ids.tolist()]) for c in again]
            own = [t for t in group.trajectories if np.array_equal(t.token_ids[:end], prefix)]
            rewards = [pays(text) for text in texts] + [t.reward for t in own]
            known = [reward for reward in rewards if reward is not None]
            assert value == (pytest.approx(np.mean(known)) if known else None)
            num_checked += 1
    assert num_checked >= 3
    assert len(added) > num_checked
    for trace in added:
        outcome = pays("".join(trace.steps))
        num_before = trace.values.index(outcome)
        num_added = len(trace.steps) - num_before
        assert trace.values == [None] * num_before + [outcome] * num_added
        assert any(
            "".join(before.steps).startswith("".join(trace.steps[: max(1, num_before)]).rstrip())
            for before in traces
        )


def _traces(count: int) -> list[StepValues]:
    """A step with a 7 is worth 0.1, a step after it nothing, others 0.9; some are unknown."""
    rng = np.random.default_rng(0)
    traces = []
    for i in range(count):
        steps = [f"{rng.integers(0, 10)} + {rng.integers(0, 10)}\n" for _ in range(3)]
        values: list[float | None] = []
        for step in steps:
            is_lost = bool(values) and values[-1] is not None and values[-1] < 0.5
            values.append(0.0 if is_lost else 0.1 if "7" in step else 0.9)
        if i % 7 == 0:
            values[0] = None
        task = Task(task_id=f"{i % 40}", taskset="x", messages=TASK.messages)
        traces.append(StepValues(task=task, steps=steps, values=values))
    return traces


async def test_a_model_learns_step_values_and_scores_them_as_a_classifier(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    from actors.process_training import train

    settings = ProcessModelSettings(epochs=6, batch_size=16, lr=3e-3)
    out = tmp_path / "model"
    progress = list(train(tiny_policy_dir, _traces(160), settings, out))
    assert [p.epoch for p in progress] == [1, 2, 3, 4, 5, 6]
    assert progress[-1].loss < progress[0].loss
    fresh = _traces(40)
    scorer = StepClassifier(str(out))
    scored = await scorer.score(TASK, [trace.steps for trace in fresh])
    scores = np.concatenate([result.scores for result in scored])
    known = [
        (score, value > 0.5)
        for score, value in zip(scores, [v for t in fresh for v in t.values], strict=True)
        if value is not None
    ]
    assert auc(np.array([s for s, _ in known]), np.array([v for _, v in known])) > 0.95


def test_nothing_to_tell_apart_is_an_error(tiny_policy_dir: Path, tmp_path: Path) -> None:
    from actors.process_training import train

    traces = [StepValues(task=TASK, steps=["1\n", "2"], values=[1.0, 1.0])] * 4
    with pytest.raises(ConfigError, match="nothing to tell apart"):
        list(train(tiny_policy_dir, traces, ProcessModelSettings(), tmp_path / "model"))


@pytest.mark.parametrize(
    ("scores", "is_right", "expected"),
    [
        ([0.9, 0.8, 0.3], [1, 0, 1], 0.5),
        ([0.9, 0.8, 0.3], [1, 1, 0], 1.0),
        ([0.5, 0.5], [1, 0], 0.5),
        ([0.5, 0.5, 0.2], [1, 0, 0], 0.75),
        ([0.1, 0.9], [1, 0], 0.0),
    ],
)
def test_auc(scores: list[float], is_right: list[int], expected: float) -> None:
    assert auc(np.array(scores), np.array(is_right, dtype=bool)) == pytest.approx(expected)


def test_auc_needs_both_kinds() -> None:
    assert np.isnan(auc(np.array([0.1, 0.2]), np.array([True, True])))


@pytest.mark.parametrize("new_layers", [0, 2])
def test_the_loss_of_writing_is_the_policys_own_weighted_by_step_values(
    tiny_policy_dir: Path, new_layers: int
) -> None:
    policy: Any = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float32)
    model = ProcessModel(
        tiny_policy_dir,
        load_tokenizer(tiny_policy_dir),
        torch.device("cpu"),
        ProcessModelSettings(new_layers=new_layers),
    )
    batch = [
        StepExample([5, 9, 7, 30, 31, 8, 40], [4, 6], [0.25, 1.0], begin=3),
        StepExample([11, 12, 13], [1, 2], [math.nan, 0.5], begin=1),
    ]
    tokens = model._tokens(batch)
    output = model._model.base_model(input_ids=tokens, output_hidden_states=True)
    total, weight = torch.zeros(()), 0.0
    for row, places, value in ((0, (3, 4), 0.25), (0, (5, 6), 1.0), (1, (2,), 0.5)):
        logprobs = policy(input_ids=tokens[row : row + 1]).logits[0].log_softmax(-1)
        for place in places:
            total = total - value * logprobs[place - 1, tokens[row, place]]
            weight += value
    torch.testing.assert_close(model._writing_loss(batch, tokens, output), total / weight)


def test_a_decoder_that_can_get_no_layers_is_refused_before_sampling(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="--new-layers must be 0 for GPT2Model"):
        require_layers(tmp_path, 2)
    require_layers(tmp_path, 0)


def test_new_layers_pass_on_what_they_get(tiny_policy_dir: Path) -> None:
    policy: Any = AutoModel.from_pretrained(tiny_policy_dir, dtype=torch.float32)
    tokenizer = load_tokenizer(tiny_policy_dir)
    model = ProcessModel(
        tiny_policy_dir, tokenizer, torch.device("cpu"), ProcessModelSettings(new_layers=2)
    )
    tokens = torch.tensor([tokenizer.encode("4 - 1 = 3\n")])
    expected = policy(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(
        model._model.base_model(input_ids=tokens).last_hidden_state, expected
    )
