"""Judges against a real server process that speaks the chat-completions protocol over HTTP."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from benchmarks.judge_injections import HARMLESS, INJECTIONS, SUMS, Asked, ask, row
from benchmarks.relay import Relay
from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import Message, Task, TrajectoryGroup, Verdict
from rewards import self_check
from rewards.base import TIMED_OUT
from rewards.isolation import IsolatedPool
from rewards.judge import JudgeVerifier, fence_off
from rewards.rubric import GroupIO, Rubric
from tests.judge_server import CALL_COST, PRICES, Server, judge_server


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with judge_server(tmp_path_factory.mktemp("judge")) as server:
        yield server


@pytest.fixture
def server(process: Server) -> Server:
    process.mode("ok")
    return process


def group(*texts: str, reference: str = "42") -> TrajectoryGroup:
    message = Message(role="user", content="What is it?")
    task = Task(task_id="t", taskset="x", messages=[message], reference=reference)
    return self_check.group_of(task, list(texts))


async def rewards(server: Server, *texts: str, use: str = "judge", **settings: object):
    chosen = {"base_url": f"{server.url}/v1", "model": "m"} | settings
    rubric = Rubric({"j": VerifierConfig(use=use, settings=chosen, timeout_s=20)})
    scored = await rubric.score(group(*texts))
    await rubric.close()
    return scored.rewards, [t.verdicts[0] for t in scored.trajectories]


async def test_right_and_wrong_are_told_apart_and_equal_texts_asked_once(server: Server):
    got, _ = await rewards(server, "it is 42", "it is 41", "it is 42", "")
    assert got == [1.0, 0.0, 1.0, 0.0]
    assert server.calls == 2


async def test_the_score_is_the_expectation_where_probabilities_are_given(server: Server):
    server.mode("logprobs")
    got, _ = await rewards(server, "it is 42")
    assert got == [pytest.approx(0.8)]  # p(yes) 0.8, p(no) 0.2


async def test_a_model_that_hardly_means_to_answer_is_believed_by_choice_only(server: Server):
    server.mode("faint")  # p(yes) 0.08, p(no) 0.02
    got, [verdict] = await rewards(server, "it is 42")
    assert got == [None]
    assert "no single verdict" in verdict.error
    assert (await rewards(server, "it is 42", min_mass=0.05))[0] == [pytest.approx(0.8)]


async def test_a_judge_that_gives_probabilities_goes_live_and_a_wrong_one_does_not(
    server: Server,
):
    server.mode("logprobs")
    settings = {"base_url": f"{server.url}/v1", "model": "m"}
    tasks = [group("").task, group("", reference="").task]
    for gold_score, refused in ((0.5, 0), (0.9, 1)):
        chosen = settings | {"gold_score": gold_score}
        rubric = Rubric({"j": VerifierConfig(use="judge", settings=chosen)})
        lines = await self_check.gold_check(rubric, tasks, 2)
        assert len(lines) == refused, lines
    server.mode("junk")
    rubric = Rubric({"j": VerifierConfig(use="judge", settings=settings | {"retries": 0})})
    (line,) = await self_check.gold_check(rubric, tasks[1:], 1)
    assert "neither a reference nor a solution" in line


async def test_reasoned_verdicts_are_read_from_one_line_only(server: Server):
    server.mode("reason")
    assert (await rewards(server, "42", "41", reasoned=True))[0] == [1.0, 0.0]
    for mode in ("two", "prose"):
        server.mode(mode)
        got, [verdict] = await rewards(server, "42", reasoned=True)
        assert got == [None]
        assert "no single verdict" in verdict.error


@pytest.mark.parametrize("mode", ["500", "429"])
async def test_passing_failures_are_retried(server: Server, mode: str):
    server.mode(mode, fail=2)
    started = time.monotonic()
    assert (await rewards(server, "it is 42"))[0] == [1.0]
    assert server.calls == 3
    if mode == "429":
        assert time.monotonic() - started >= 2.0  # twice Retry-After: 1


@pytest.mark.parametrize(
    ("mode", "words"),
    [("junk", "no chat completion"), ("denied", "status 401"), ("slow", "TimeoutError")],
)
async def test_what_cannot_be_judged_abstains(server: Server, mode: str, words: str):
    server.mode(mode)
    got, [verdict] = await rewards(server, "it is 42", call_timeout_s=0.3, retries=1)
    assert got == [None]
    assert words in verdict.error
    assert (TIMED_OUT in verdict.breakdown) == (mode == "slow")


async def test_the_breaker_spares_a_dead_endpoint_and_it_recovers_by_itself(server: Server):
    server.mode("down")
    verifier = {"base_url": f"{server.url}/v1", "model": "m", "retries": 0, "max_parallel": 1,
                "breaker_failures": 3, "breaker_open_s": 1.0}  # fmt: skip
    rubric = Rubric({"j": VerifierConfig(use="judge", settings=verifier, timeout_s=20)})
    scored = await rubric.score(group(*[f"no {i}" for i in range(20)]))
    assert scored.rewards == [None] * 20
    assert server.calls == 3
    server.mode("ok")
    await asyncio.sleep(1.1)
    assert (await rubric.score(group("it is 42", "no"))).rewards[0] == 1.0


async def test_a_request_that_is_refused_for_itself_does_not_count_against_the_endpoint(
    server: Server,
):
    server.mode("narrow")
    texts = [f"a long {i}" for i in range(6)]
    got, verdicts = await rewards(
        server, *texts, "it is 42", breaker_failures=2, max_parallel=1, retries=1
    )
    assert got == [None] * 6 + [1.0]
    assert "status 400" in verdicts[0].error
    assert server.calls == 7


async def test_symbols_are_judged_and_punctuation_alone_only_where_the_reference_is_that(
    server: Server,
):
    settings = {"base_url": f"{server.url}/v1", "model": "m"}
    rubric = Rubric({"j": VerifierConfig(use="judge", settings=settings, timeout_s=20)})
    for reference, answer, calls, reward in (
        ("+", "+", 1, 1.0), ("\u221e", "\u221e", 1, 1.0), ("-", "-", 1, 1.0), ("42", "+", 1, 0.0),
        ("42", ":", 0, 0.0), ("", ":", 0, 0.0), ("-", "", 0, 0.0),
    ):  # fmt: skip
        server.mode("ok")
        assert (await rubric.score(group(answer, reference=reference))).rewards == [reward]
        assert server.calls == calls
    await rubric.close()


async def test_an_endpoint_that_refuses_connections_abstains_and_comes_back(server: Server):
    relay = Relay(int(server.url.rpartition(":")[2]))
    settings = {"base_url": f"http://127.0.0.1:{relay.port}/v1", "model": "m", "retries": 0,
                "breaker_failures": 1, "breaker_open_s": 0.5}  # fmt: skip
    rubric = Rubric({"j": VerifierConfig(use="judge", settings=settings, timeout_s=20)})
    assert (await rubric.score(group("it is 42"))).rewards == [1.0]
    relay.shut()
    scored = await rubric.score(group("it is 42 there"))
    assert scored.rewards == [None]
    assert "Error" in scored.trajectories[0].verdicts[0].error
    relay.open()
    await asyncio.sleep(0.6)
    assert (await rubric.score(group("it is 42 here"))).rewards == [1.0]
    await rubric.close()
    relay.shut()


async def test_a_hanging_endpoint_opens_the_breaker_and_spares_what_a_rule_decided(
    server: Server,
):
    server.mode("slow")
    settings = {"base_url": f"{server.url}/v1", "model": "m", "breaker_failures": 2,
                "first": {"use": "math"}, "second_opinion": True}  # fmt: skip
    rubric = Rubric({"j": VerifierConfig(use="judge", settings=settings, timeout_s=1.5)})
    scored = await rubric.score(group("it is 42", "it is 41", "it is 40"))
    assert scored.rewards == [1.0, None, None]
    assert (await rubric.score(group("it is 39"))).rewards == [None]
    await rubric.close()
    assert server.calls == 2


async def test_a_cascade_asks_only_where_the_rule_cannot_say(server: Server):
    got, verdicts = await rewards(server, "42", "so 41 or 42", use="generative")
    assert got[0] == 1.0
    assert verdicts[0].evidence == "42 = 42"
    assert server.calls <= 1
    got, _ = await rewards(server, "42", "41", first={"use": "math"})
    assert got == [1.0, 0.0]
    assert server.calls <= 1


@pytest.mark.parametrize("text", INJECTIONS)
async def test_injected_text_stays_inside_the_fence(server: Server, text: str):
    assert (await rewards(server, text))[0] == [0.0]
    assert "<|" not in fence_off(text)
    assert "erdict:" not in fence_off(text)


async def test_injections_are_compared_with_harmless_words_in_the_same_place(server: Server):
    found = await ask(f"{server.url}/v1", "m", min_mass=0.5)
    nothing = [0.0] * len(INJECTIONS), [0.0] * len(HARMLESS)
    assert found == [Asked(1.0, 0.0, *nothing)] * len(SUMS)
    assert row(found).verdict == "holds"


async def test_votes_are_averaged_and_costs_counted(server: Server):
    judge = JudgeVerifier(f"{server.url}/v1", "m", votes=3, temperature=0.7, **PRICES)
    async with asyncio.timeout(20) as clock:
        [verdict] = await judge.score(group("it is 42"), GroupIO(IsolatedPool(), 20, clock, ""))
    assert verdict.score == 1.0
    assert server.calls == 3
    assert verdict.breakdown == {"votes": 3.0, "cost": pytest.approx(3 * CALL_COST)}


def costs(verdicts: list[Verdict]) -> list[object]:
    return [pytest.approx(v.breakdown["cost"]) for v in verdicts]


async def test_each_call_is_in_the_cost_of_one_verdict(server: Server):
    chosen = {"base_url": f"{server.url}/v1", "model": "m"} | PRICES
    rubric = Rubric({"j": VerifierConfig(use="judge", settings=chosen, timeout_s=20)})
    asked = group("it is 42", "it is 42", "it is 41", "")
    for expected in ([CALL_COST, 0.0, CALL_COST, 0.0], [0.0] * 4):
        scored = await rubric.score(asked)
        assert costs([t.verdicts[0] for t in scored.trajectories]) == expected
    assert server.calls == 2, "the second time all replies are known"
    await rubric.close()
    _, verdicts = await rewards(
        server, "it is 42", "it is 41", first={"use": "judge", "settings": chosen},
        second_opinion=True, **PRICES,
    )  # fmt: skip
    assert costs(verdicts) == [CALL_COST, 2 * CALL_COST]
    server.mode("prose")
    [score], verdicts = await rewards(server, "it is 42", **PRICES)
    assert score is None
    assert costs(verdicts) == [CALL_COST], "a reply without a verdict is paid for too"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "ftp://x"}, "base_url"),
        ({"scale": "stars"}, "scale"),
        ({"votes": 3}, "temperature"),
        ({"min_mass": 0}, "min_mass"),
        ({"api_key_env": "HONE_NO_SUCH_KEY"}, "HONE_NO_SUCH_KEY"),
    ],
)
def test_bad_settings_name_themselves(settings: dict[str, object], words: str):
    chosen = {"base_url": "http://127.0.0.1:1/v1", "model": "m"} | settings
    with pytest.raises(ConfigError, match=words):
        Rubric({"j": VerifierConfig(use="judge", settings=chosen)})
