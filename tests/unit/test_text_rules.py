import time

import numpy as np
import pytest

from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import Message, Task, Trajectory, TrajectoryGroup, TrajectoryStatus
from rewards.rubric import Rubric


def group_of(texts: list[str], num_tokens: list[int] | None = None) -> TrajectoryGroup:
    lengths = num_tokens or [1] * len(texts)
    return TrajectoryGroup(
        group_id="g",
        task=Task(task_id="t", taskset="x", messages=[Message(role="user", content="Say it.")]),
        trajectories=[
            Trajectory(
                trajectory_id=f"g-{i}",
                group_id="g",
                task_id="t",
                context_tokens=np.zeros(1, np.int32),
                token_ids=np.zeros(length, np.int32),
                loss_mask=np.ones(length, np.bool_),
                rollout_logprobs=np.zeros(length, np.float32),
                version_spans=[],
                status=TrajectoryStatus.COMPLETED,
                text=text,
            )
            for i, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ],
    )


async def scores(use: str, settings: dict[str, object], group: TrajectoryGroup):
    rubric = Rubric({"rule": VerifierConfig(use=use, settings=settings)})
    return (await rubric.score(group)).rewards


async def test_format_matches_the_whole_completion_or_searches_it():
    group = group_of(["<think>a\nb</think> 5", "so 5", "x <think></think>"])
    assert await scores("format", {"pattern": "<think>.*</think>.*"}, group) == [1, 0, 0]
    assert await scores("format", {"pattern": "<think>", "match": "search"}, group) == [1, 0, 1]


async def test_format_that_backtracks_without_end_abstains_quickly():
    group = group_of(["a" * 60 + "b", "aaa"])
    started = time.perf_counter()
    assert await scores("format", {"pattern": "(a|aa)+"}, group) == [None, 1.0]
    assert time.perf_counter() - started < 1.0


async def test_length_falls_linearly_over_the_last_tokens():
    group = group_of(["x"] * 5, [10, 80, 90, 100, 130])
    settings = {"max_tokens": 100, "soft_tokens": 20}
    assert await scores("length", settings, group) == pytest.approx([1, 1, 0.5, 0, 0])
    assert await scores("length", {"max_tokens": 100}, group) == [1, 1, 1, 1, 0]


async def test_repetition_is_paid_less_the_more_of_it_there_is():
    varied = " ".join(f"word{i}" for i in range(40))
    group = group_of([varied, "again and again " * 20, "a b a b a b a b", "no no no"])
    got = await scores("repetition", {"ngram": 2, "min_words": 8}, group)
    assert got[0] == 1.0
    assert got[1] < 0.1
    assert got[2] == pytest.approx((1 - 5 / 7) / 0.8)
    assert got[3] == 1.0


@pytest.mark.parametrize(
    ("use", "settings", "words"),
    [
        ("format", {"pattern": "("}, "regular expression"),
        ("format", {"pattern": "a", "match": "start"}, "fullmatch"),
        ("format", {"pattern": "A: .*", "example": "{answer}"}, "must match the pattern"),
        ("format", {"patern": "a"}, "did you mean 'pattern'"),
        ("length", {"max_tokens": 10, "soft_tokens": 20}, "soft_tokens <= max_tokens"),
        ("length", {}, "missing setting"),
        ("repetition", {"ngram": 0}, "ngram >= 1"),
    ],
)
def test_bad_settings_name_their_knob(use: str, settings: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=r"rewards\.verifiers\.rule") as error:
        Rubric({"rule": VerifierConfig(use=use, settings=settings)})
    assert words in str(error.value)
