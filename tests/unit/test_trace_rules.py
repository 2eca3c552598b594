import msgspec
import numpy as np
import pytest

from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import Task, TrajectoryGroup, VersionSpan
from rewards.rubric import Rubric
from rewards.self_check import gold_check, group_of


def group(*texts: str, lengths: list[int] | None = None) -> TrajectoryGroup:
    made = group_of(Task(task_id="t", taskset="x", messages=[], reference="42"), list(texts))
    trajectories = [
        msgspec.structs.replace(
            t, token_ids=np.zeros(n, np.int32), loss_mask=np.ones(n, np.bool_),
            rollout_logprobs=np.zeros(n, np.float32), version_spans=[VersionSpan(0, 0, n)],
        )
        for t, n in zip(made.trajectories, lengths or [5] * len(texts), strict=True)
    ]  # fmt: skip
    return msgspec.structs.replace(made, trajectories=trajectories)


async def scores(use: str, given: TrajectoryGroup, **settings: object) -> list[float | None]:
    return (await Rubric({"v": VerifierConfig(use=use, settings=settings)}).score(given)).rewards


async def test_among_right_completions_the_shorter_earns_more():
    given = group("42", "42", "42", "41", lengths=[10, 20, 30, 1])
    assert await scores("efficiency", given, correct={"use": "math"}) == [1.0, 0.75, 0.5, 0.0]
    doubled = group("42", "42", "42", "41", lengths=[20, 40, 60, 2])
    assert await scores("efficiency", doubled, correct={"use": "math"}) == [1.0, 0.75, 0.5, 0.0]
    assert await scores("efficiency", group("42", "0"), correct={"use": "math"}) == [1.0, 0.0]


async def test_what_was_given_is_nobodys_length():
    """The third is given whole: it is compared with nobody."""
    mixed = group("42", "42", "42", lengths=[10, 200, 500])
    given = [
        msgspec.structs.replace(trajectory, num_given=n)
        for trajectory, n in zip(mixed.trajectories, (0, 180, 500), strict=True)
    ]
    mixed = msgspec.structs.replace(mixed, trajectories=given)
    assert await scores("efficiency", mixed, correct={"use": "math"}) == [1.0, 0.5, 1.0]
    assert await scores("length", mixed, max_tokens=20) == [1.0, 1.0, 1.0]
    assert await scores("length", mixed, max_tokens=15) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "good", "bad"),
    [
        ({"max_words": 3}, "one two three", "one two three four"),
        ({"uppercase": True}, "WE ADD 2.", "We add 2."),
        ({"ends_with": "Done."}, "2 + 2. Done.", "Done. 2 + 2"),
        ({"is_json": True}, '{"a": [1]}', "{a: 1}"),
        ({"no_comma": True}, "first; then", "first, then"),
        ({"language": "fr"}, "nous avons le nombre et donc la somme est", "we have the sum and it"),
    ],
)
async def test_instructions_are_checked_in_the_trace_only(
    settings: dict[str, object], good: str, bad: str
):
    texts = [f"<think>{t}</think>The answer, in short, is 4." for t in (good, bad, "")]
    assert await scores("trace", group(*texts, "no trace"), **settings) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "we know that the sum of it is even", 1.0),
        ("en", "wir wissen dass die Summe nicht gerade ist", 0.0),
        ("de", "wir wissen dass die Summe nicht gerade ist", 1.0),
        ("ru", "мы знаем что сумма чисел равна four", 6 / 7),
        ("en", "ok", 1.0),
    ],
)
async def test_language(language: str, text: str, expected: float):
    assert await scores("language", group(text), language=language) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("use", "settings"),
    [
        ("efficiency", {"correct": {"use": "math"}, "eta": 1.0}),
        ("language", {"language": "xx"}),
        ("trace", {}),
    ],
)
def test_bad_settings_are_refused(use: str, settings: dict[str, object]):
    with pytest.raises(ConfigError):
        Rubric({"v": VerifierConfig(use=use, settings=settings)})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_words": 3}, {"uppercase": True}, {"ends_with": "Done."}, {"is_json": True},
        {"no_comma": True}, {"language": "en"}, {"language": "de", "ends_with": "Also."},
        {"language": "zh"}, {"language": "ja"}, {"language": "ar", "max_words": 10},
        {"is_json": True, "uppercase": True, "max_words": 1}, {"is_json": True, "ends_with": "}"},
    ],
)  # fmt: skip
async def test_a_gold_answer_passes_in_a_trace_that_follows(settings: dict[str, object]):
    rubric = Rubric(
        {
            "correct": VerifierConfig(use="math"),
            "trace": VerifierConfig(use="trace", settings=settings, weight=0.5),
        }
    )
    assert await gold_check(rubric, [group("42").task], 1) == []
