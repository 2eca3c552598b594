"""Hint sources, the program `guide`, and what the learner gets to see of a hinted trajectory."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.guide import Guide, with_hint
from actors.hints import SOURCES, names
from actors.rollout import RolloutRequest, Sampling
from cluster import plugins
from cluster.errors import ConfigError, HintError
from cluster.types import Message, Task, TrajectoryStatus
from learners.batch import MicroBatch, Row
from tests.random_policy import RandomPolicy

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40)
TASK = Task(
    task_id="t",
    taskset="demo",
    messages=[Message(role="system", content="Be brief."), Message(role="user", content="1 + 2 =")],
    reference="3",
    solution="1 + 1 = 2 and 2 + 1 = 3",
    hints=["count", "count on from 1", "1, 2, and then?"],
)


class Writer(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint: the strength asked for picks the reply."""

    replies = ("count up", "It is 3.", "", None)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        system, user = (message["content"] for message in request["messages"])
        found = re.search(r"strength (\d)", system)
        assert found is not None
        assert "1 + 2 =" in user
        assert "Answer: 3" in user
        text = self.replies[int(found[1]) - 1]
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(401 if text is None else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def writer() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Writer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_writer_gives_hints_by_strength_and_never_the_answer(writer: str) -> None:
    values = {"base_url": writer, "model": "m", "levels": 4, "retries": 0}
    assert hint("writer", 1, **values) == "count up"
    for level, problem in ((2, "gave the answer away"), (3, "empty hint"), (4, "status 401")):
        with pytest.raises(HintError, match=problem):
            hint("writer", level, **values)


def request(task: Task, level: int, seed: int = 0) -> RolloutRequest:
    return RolloutRequest("g", task, 4, Sampling(6, 0.7, [1], seed), hint_level=level)


def run(program: Guide, asked: RolloutRequest, **io: Any) -> tuple[Any, RandomPolicy]:
    policy = RandomPolicy(asked.sampling, **io)
    return asyncio.run(program.run(asked, policy)), policy


def hint(use: str, level: int, task: Task = TASK, **values: Any) -> str:
    source = plugins.build(use, values, SOURCES, "hints")
    return asyncio.run(source.hint(task, level))


@given(prompt=TEXTS, text=TEXTS, seed=st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_the_learner_sees_the_plain_context_and_no_token_of_the_hint(
    prompt: str, text: str, seed: int
) -> None:
    task = Task(
        task_id="t", taskset="x", messages=[Message(role="user", content=prompt)], hints=[text]
    )
    plain, plain_policy = run(Guide(reject=""), request(task, 0, seed))
    group, policy = run(Guide(reject=""), request(task, 1, seed))
    [seen], [unhinted] = policy.contexts, plain_policy.contexts
    assert [t.arm for t in plain.trajectories] == ["plain"] * 4
    for trajectory in group.trajectories:
        assert trajectory.arm == "guided"
        assert trajectory.context_tokens.tolist() == seen.tolist() != unhinted.tolist()
        assert text in policy.decode(seen)
        row = Row.of(trajectory, np.ones(len(trajectory.token_ids), dtype=np.float32), 5)
        pack = MicroBatch.pack([row])
        trained = [*unhinted.tolist(), *trajectory.token_ids.tolist()]
        assert pack.token_ids.tolist() == trained
        assert pack.labels.tolist() == trajectory.token_ids.tolist()
        assert pack.loss_index.min() == len(unhinted) - 1
        assert pack.is_guided.all()
        assert pack.policy_age.tolist() == [2.0] + [1.0] * (len(trajectory.token_ids) - 1)
        assert trajectory.min_policy_version == 3


def test_a_hint_that_is_not_stripped_is_trained_on() -> None:
    group, policy = run(Guide(strip=False, reject=""), request(TASK, 1))
    [seen] = policy.contexts
    for trajectory in group.trajectories:
        pack = MicroBatch.pack([Row.of(trajectory, np.ones(len(trajectory.token_ids)))])
        assert pack.token_ids.tolist() == [*seen.tolist(), *trajectory.token_ids.tolist()]
        assert pack.is_hinted.all()
        assert not pack.is_guided.any()


@given(text=TEXTS, seed=st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_a_solution_begun_in_the_completion_has_no_gradient_on_what_was_given(
    text: str, seed: int
) -> None:
    task = Task(
        task_id="t", taskset="x", messages=[Message(role="user", content="q")], hints=[text]
    )
    group, policy = run(Guide(place="completion", reject=""), request(task, 1, seed))
    given_tokens = policy.encode(text + "\n")
    for trajectory in group.trajectories:
        assert trajectory.train_context_tokens is None
        count = len(given_tokens)
        assert trajectory.token_ids[:count].tolist() == given_tokens.tolist()
        assert not trajectory.loss_mask[:count].any()
        assert trajectory.loss_mask[count:].all()
        assert trajectory.text.startswith(policy.decode(given_tokens))
        assert trajectory.version_spans[0].start == count
        assert trajectory.rollout_logprobs.dtype == np.float32
        pack = MicroBatch.pack([Row.of(trajectory, np.ones(len(trajectory.token_ids)))])
        assert pack.is_hinted.all(), "SIREN's anchor leaves it out"
        assert not pack.is_guided.any(), "and its ratio has no shift of context"


def test_a_worked_solution_goes_on_where_it_was_cut() -> None:
    program = Guide({"use": "solution", "settings": {"shares": [0.4]}}, place="completion")
    group, policy = run(program, request(TASK, 1))
    for trajectory in group.trajectories:
        begun = trajectory.token_ids[~trajectory.loss_mask]
        assert begun.tolist() == policy.encode("1 + 1 =").tolist()


@given(prompt=TEXTS, text=TEXTS)
def test_neither_prompt_nor_hint_is_read_as_a_template(prompt: str, text: str) -> None:
    messages = [Message(role="user", content=prompt + "{hint}")]
    [message] = with_hint(messages, "{prompt} / {hint}", text + "{prompt}")
    assert message.content == f"{prompt}{{hint}} / {text}{{prompt}}"


def test_the_hint_stands_in_the_last_message_alone() -> None:
    _, policy = run(Guide(template="{hint}: {prompt}"), request(TASK, 2))
    assert policy.decode(policy.contexts[0]) == "Be brief.\ncount on from 1: 1 + 2 =\n"


def test_hints_of_the_task_rise_in_strength() -> None:
    assert [hint("dataset", level) for level in (1, 2, 3)] == TASK.hints
    assert [hint("dataset", level, max_levels=2) for level in (1, 2)] == TASK.hints[1:]
    assert hint("solution", 1, shares=[0.4, 0.7]) == "1 + 1 ="
    assert hint("solution", 2, shares=[0.4, 0.7]) == "1 + 1 = 2 and 2"
    assert hint("answer", 1) == "3"
    with pytest.raises(HintError, match="is no hint"):
        hint("solution", 1, Task(task_id="s", taskset="x", messages=[], solution="one two"))


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [("so 12.", "12", True), ("112", "12", False), ("12.5", "12", False), ("x", "", False)],
)
def test_an_answer_is_found_as_a_word(text: str, answer: str, expected: bool) -> None:
    assert names(text, answer) is expected


def test_what_leans_on_the_hint_is_left_out() -> None:
    group, policy = run(Guide(reject="."), request(TASK, 1))
    written = [policy.decode(t.token_ids) for t in group.trajectories]
    assert [t.status is TrajectoryStatus.ERROR for t in group.trajectories] == [
        text != "\n" and bool(text) for text in written
    ]


def test_a_hint_too_long_gives_way_and_the_task_stays() -> None:
    with pytest.raises(HintError, match=r"rollout\.max_new_tokens leaves 14 of policy\.context"):
        run(Guide(), request(TASK, 3), context_length=20)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"place": "answer"}, "place must be"),
        ({"merge": "append"}, "merge must be"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"template": "{hint}"}, r"template must contain \{prompt\}"),
        ({"hints": {"use": "datset"}}, "did you mean 'dataset'"),
        ({"hints": {"use": "solution", "settings": {"shares": [0.5, 0.2]}}}, "shares must rise"),
        ({"hints": {"use": "dataset", "settings": {"max_levels": 0}}}, "max_levels"),
    ],
)
def test_wrong_settings_name_the_knob(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Guide(**values)


def test_tasks_without_hints_are_refused() -> None:
    bare = Task(task_id="b", taskset="x", messages=[], reference="1")
    with pytest.raises(ConfigError, match=r"settings\.hints: needs tasks with hints"):
        Guide().check([bare])
    with pytest.raises(ConfigError, match="a worked solution"):
        Guide(hints={"use": "solution"}).check([bare])
    Guide(hints={"use": "answer"}).check([bare])
