"""Rollouts that go on from a solution's beginning: its length, and what the learner sees of it."""

import asyncio
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.curriculum import Curriculum
from actors.prefix import SolutionPrefix
from actors.prefix_length import PrefixLength, PrefixRule
from actors.programs import needs_guided_loss, prefix_length
from actors.rollout import RolloutRequest, Sampling, build_trajectory
from cluster.config import Config, Plugin
from cluster.errors import ConfigError
from cluster.run_state import CurriculumState, PrefixState
from cluster.types import (
    Author,
    GroupHeader,
    Message,
    Passes,
    Segment,
    Task,
    TrajectoryStatus,
    Verdict,
)
from learners.batch import MicroBatch, Row
from learners.logprobs import TokenOutputs
from learners.mismatch import gaps
from tests.random_policy import RandomPolicy

SAMPLING = Sampling(6, 0.7, [1], seed=3)
TASK = Task(
    task_id="t", taskset="demo", messages=[Message(role="user", content="1 + 2 =")],
    solution="1 + 1 = 2 and 2 + 1 = 3",
)  # fmt: skip
RULE = PrefixRule(1000, 3072)


@pytest.mark.parametrize(
    ("accuracies", "tokens"),
    [  # TV-F2
        ((0.4, 0.5, 0.3), 1500),
        ((0.4, 0.5, 0.9), 500),
        ((0.4, 0.5, 0.0), 1000),
        ((0.0, 0.0, 0.5), 1000),
        ((0.0, 0.4, 0.1), 2000),
        ((0.9, 0.9, 0.1), 3072),
        ((0.5, 0.5, 0.5), 1000),
    ],
)
def test_worse_than_before_gets_a_longer_beginning(
    accuracies: tuple[float, ...], tokens: int
) -> None:
    assert RULE.next(1000, accuracies) == tokens


def test_a_length_never_falls_below_one_token() -> None:
    assert PrefixRule(1, 8).next(1, (0.1, 0.1, 1.0)) == 1


def observed(length: PrefixLength, *steps: tuple[int, int], longest: int = 9999) -> list[int]:
    """Tokens after each step of (passed, failed), in two groups; neither counts the unjudged."""
    lengths: list[int] = []
    for num_passed, num_failed in steps:
        begun = Passes(longest_prefix=min(longest, length.tokens), asked_prefix=length.tokens)
        length.settle(begun + Passes(num_passed=num_passed, num_judged=num_passed))
        length.settle(Passes(num_judged=num_failed))
        length.end_step()
        lengths.append(length.tokens)
    return lengths


def test_every_third_step_moves_the_length_and_steps_without_a_verdict_do_not_count() -> None:
    length = PrefixLength(RULE)
    steps = [(4, 6), (5, 5), (0, 0), (3, 7), (3, 7), (3, 7), (6, 4)]
    assert observed(length, *steps) == [1000, 1000, 1000, 1500, 1500, 1500, 750]
    fixed = PrefixLength(PrefixRule(1000, 3072, adapts=False))
    assert observed(fixed, *steps) == [1000] * len(steps)


def test_a_length_beyond_all_solutions_moves_from_the_longest_beginning_that_there_was() -> None:
    steps = [(4, 6), (4, 6), (8, 2)]
    assert observed(PrefixLength(RULE), *steps, longest=40)[-1] == 20
    assert observed(PrefixLength(RULE), *steps, longest=0)[-1] == 500, "no rollout was begun"


@pytest.mark.parametrize("age", range(9))
def test_groups_that_asked_for_an_earlier_length_do_not_undo_a_longer_one(age: int) -> None:
    length = PrefixLength(RULE)
    asked = [length.tokens] * age  # of the groups that are on their way
    for num_passed in (2, 2, 1, *[1] * 20):
        asked.append(length.tokens)
        was = asked.pop(0)
        length.settle(
            Passes(num_passed=num_passed, num_judged=4, longest_prefix=was, asked_prefix=was)
        )
        length.end_step()
    assert length.tokens == 2000


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.integers(0, 12))
def test_a_length_that_is_saved_and_restored_goes_on_as_if_it_had_not_been(
    steps: list[tuple[int, int]], at: int
) -> None:
    """Also when a group of the next step was dropped before the save."""
    whole, first, second = (PrefixLength(RULE) for _ in range(3))
    before = observed(first, *steps[:at])
    assert observed(whole, *steps[:at]) == before
    for length in (first, whole):
        length.settle(Passes(num_passed=1, num_judged=2, longest_prefix=30))
    saved = msgspec.msgpack.decode(msgspec.msgpack.encode(first.state()), type=PrefixState)
    second.restore(saved)
    assert second.state() == whole.state()
    assert observed(second, *steps[at:]) == observed(whole, *steps[at:])
    second.restore(None)
    assert second.tokens == 1000


def test_requests_carry_the_length_and_a_checkpoint_keeps_it() -> None:
    curriculum = Curriculum([TASK], 0, SAMPLING, 4, PrefixLength(RULE))
    assert curriculum.next().prefix_tokens == 1000
    for num_passed in (2, 2, 1):
        curriculum.note_passes(Passes(num_passed=num_passed, num_judged=2, longest_prefix=1000))
        curriculum.end_step([Passes(num_judged=2)])
    assert curriculum.next().prefix_tokens == 2000
    resumed = Curriculum([TASK], 0, SAMPLING, 4, PrefixLength(RULE))
    resumed.restore(curriculum.state())
    assert resumed.next().prefix_tokens == 2000
    resumed.restore(CurriculumState())
    assert resumed.next().prefix_tokens == 1000
    assert Curriculum([TASK], 0, SAMPLING, 4).next().prefix_tokens == 0


def test_only_a_first_segment_may_be_given() -> None:
    tokens = np.array([5, 6], np.int32)
    parts = [
        Segment(token_ids=tokens, logprobs=np.zeros(2, np.float32), author=author)
        for author in (Author.POLICY, Author.GIVEN)
    ]
    request = RolloutRequest("g", TASK, 1, SAMPLING)
    with pytest.raises(ValueError, match="only the first segment"):
        build_trajectory(request, 0, tokens, parts, TrajectoryStatus.COMPLETED, "")


def test_a_header_says_how_many_passed_and_how_long_the_longest_beginning_was() -> None:
    [*plain, begun] = run(5)[0].trajectories
    scores = (1.0, 0.2, None)
    judged = [
        msgspec.structs.replace(t, verdicts=[Verdict(score=score), Verdict(score=0.9)])
        for t, score in zip(plain, scores, strict=True)
    ]
    group = msgspec.structs.replace(run(5)[0], trajectories=[*judged, begun])
    passes = GroupHeader.of(group).passes
    assert passes == Passes(num_passed=1, num_judged=2, longest_prefix=5, asked_prefix=5)
    assert begun.passed is None
    both = passes + Passes(num_passed=2, num_judged=3)
    assert both == Passes(num_passed=3, num_judged=5, longest_prefix=5, asked_prefix=5)
    assert (both + Passes(asked_prefix=3)).asked_prefix == 3


def run(
    prefix_tokens: int, task: Task = TASK, samples: int = 1, learn: bool = False, **io: Any
) -> tuple[Any, RandomPolicy]:
    policy = RandomPolicy(SAMPLING, **io)
    asked = RolloutRequest("g", task, 4, SAMPLING, prefix_tokens=prefix_tokens)
    program = SolutionPrefix(tokens=9, samples=samples, learn=learn)
    return asyncio.run(program.run(asked, policy)), policy


@given(prefix_tokens=st.integers(1, 40), samples=st.integers(1, 3))
def test_the_learner_sees_the_beginning_and_learns_no_token_of_it(
    prefix_tokens: int, samples: int
) -> None:
    group, policy = run(prefix_tokens, samples=samples)
    solution = policy.encode(TASK.solution)
    length = min(prefix_tokens, len(solution) - 1)
    assert [t.arm for t in group.trajectories] == ["plain"] * (4 - samples) + ["guided"] * samples
    assert [t.trajectory_id for t in group.trajectories] == [f"g/{i}" for i in range(4)]
    context = policy.render(TASK.messages)
    for trajectory in group.trajectories[-samples:]:
        assert trajectory.token_ids[:length].tolist() == solution[:length].tolist()
        assert trajectory.loss_mask.tolist()[:length] == [False] * length
        assert trajectory.loss_mask[length:].all()
        assert trajectory.context_tokens.tolist() == context.tolist()
        assert trajectory.train_context_tokens is None
        assert trajectory.min_policy_version == 3
        assert trajectory.num_begun == length
        assert trajectory.text == policy.decode(trajectory.token_ids)
        row = Row.of(trajectory, np.ones(len(trajectory.token_ids), dtype=np.float32), 4)
        pack = MicroBatch.pack([row])
        assert pack.labels.tolist() == trajectory.token_ids[length:].tolist()
        assert pack.is_hinted.all()
        assert not pack.is_guided.any()


def test_given_tokens_are_learned_as_if_they_had_been_certain_where_that_is_asked_for() -> None:
    group, policy = run(5, learn=True)
    begun = group.trajectories[-1]
    solution = policy.encode(TASK.solution).tolist()
    assert begun.num_given == begun.num_begun == 5
    assert begun.token_ids.tolist()[:5] == solution[:5]
    assert begun.loss_mask.all()
    assert begun.rollout_logprobs.tolist()[:5] == [0.0] * 5
    assert (begun.rollout_logprobs[5:] < 0).all()
    row = Row.of(begun, np.ones(len(begun.token_ids), dtype=np.float32), 4)
    pack = MicroBatch.pack([row, Row.plain(row.context, row.completion)])
    given = [True] * 5 + [False] * (2 * len(row.completion) - 5)
    assert pack.is_given.tolist() == pack.is_guided.tolist() == given
    outputs = TokenOutputs(*(torch.full((pack.num_loss_tokens,), -2.0) for _ in range(3)))
    for seen in (pack, replace(pack, sampled_logprobs=torch.zeros(pack.num_loss_tokens))):
        gap, is_compared = gaps(seen, outputs)
        assert is_compared.tolist() == [not each for each in given], "a mismatch with nobody"
        assert gap.tolist()[:5] == [0.0] * 5


@given(prefix_tokens=st.integers(0, 40))
def test_a_length_beyond_the_solution_gives_all_of_it(prefix_tokens: int) -> None:
    group, policy = run(prefix_tokens, learn=True, samples=2)
    [*_, plain, _, whole] = group.trajectories
    solution = policy.encode(TASK.solution).tolist()
    is_whole = prefix_tokens >= len(solution)
    assert (whole.token_ids.tolist() == [*solution, SAMPLING.stop_token_ids[0]]) == is_whole
    assert (whole.num_given == len(whole.token_ids)) == is_whole
    if is_whole:
        assert whole.text == TASK.solution
        assert whole.status is TrajectoryStatus.COMPLETED
        assert group.min_policy_version == plain.min_policy_version == 3, "nobody's has no version"
        assert len(policy.contexts) == 1
    context = len(policy.contexts[0])
    short, _ = run(40, learn=True, context_length=context + len(solution))
    assert [t.num_given for t in short.trajectories[:3]] == [0] * 3
    assert 0 < short.trajectories[3].num_given < len(solution)


def test_without_a_solution_room_or_a_length_all_rollouts_are_plain() -> None:
    without = msgspec.structs.replace(TASK, solution="")
    context = len(run(0)[1].contexts[0])
    for group, policy in (run(0), run(5, without), run(5, context_length=context + 6)):
        assert [t.arm for t in group.trajectories] == ["plain"] * 4
        assert len(policy.contexts) == 1
    _, cut = run(5, context_length=context + 6 + 2)
    assert [len(seen) for seen in cut.contexts] == [context, context + 2]


def with_program(config: Config, **settings: Any) -> Config:
    program = Plugin(use="prefix", settings=settings)
    rollout = config.rollout.model_copy(update={"program": program})
    return config.model_copy(update={"rollout": rollout})


def test_settings_that_cannot_work_name_their_knob(tiny_config: Config) -> None:
    assert prefix_length(tiny_config) is None
    found = prefix_length(with_program(tiny_config, tokens=5, samples=3))
    assert found is not None
    assert found.tokens == 5
    for settings, problem in (
        ({"tokens": 5, "samples": 4}, r"settings\.samples: must be below rollout\.group_size \(4"),
        ({"tokens": 5, "samples": 0}, "samples must be at least 1"),
        ({"tokens": 0}, r"tokens must lie in 1 \.\. max_tokens"),
        ({"tokens": 9, "max_tokens": 8}, r"tokens must lie in 1 \.\. max_tokens"),
        ({}, "missing setting"),
    ):
        with pytest.raises(ConfigError, match=problem):
            prefix_length(with_program(tiny_config, **settings))
    for learn in (False, True):
        config = with_program(tiny_config, tokens=5, learn=learn)
        assert needs_guided_loss(config) == learn
    with pytest.raises(ConfigError, match="column `solution`"):
        SolutionPrefix(tokens=5).check([msgspec.structs.replace(TASK, solution=" ")])
