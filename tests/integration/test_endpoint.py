"""The policy endpoint as its users meet it: the official client against a real Ray Serve app.

One endpoint serves the whole module (an engine takes half a minute to load), so the tests are one
story in order: query, follow, pin, canary, promote, roll back, guard.
"""

import asyncio
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import ray
import torch
from ray.serve.config import HTTPOptions
from safetensors.torch import load_file

from cluster.config import Config
from cluster.errors import ConfigError
from serve import chat, endpoint
from serve.api_keys import KeyStore
from serve.client import AdminClient, AdminError, Runs
from tests import browser, monitoring_cases, page_cases
from tests.doors import doors
from tests.endpoint_cases import Publisher, publish, put
from tests.endpoint_fuzz import answers_without_key, dangling_references, fuzz
from tests.served import PORT, URL, Served, serving, until


@pytest.fixture(scope="module")
def served(
    tiny_config: Config, tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(tiny_config, tiny_policy_dir, tmp_path_factory.mktemp("runs")) as served:
        yield served


def test_models_are_listed_and_all_forms_of_request_work(served: Served) -> None:
    names = [model.id for model in served.client.models.list()]
    assert names == ["policy", "policy@latest", "policy@1"]
    assert served.client.models.retrieve("policy@1").id == "policy@1"
    chat = served.client.chat.completions.create(
        model="policy", messages=[{"role": "user", "content": "1 + 2 ="}], n=2, seed=3,
        max_tokens=8, logprobs=True, top_logprobs=2, stop=["\n"],
    )  # fmt: skip
    assert chat.model == "policy@1"
    assert len(chat.choices) == 2
    assert chat.usage.completion_tokens == sum(len(c.logprobs.content) for c in chat.choices)
    assert {span["policy_version"] for span in chat.policy_versions} == {1}
    first, same, other = served.ask(), served.ask(), served.ask(seed=2)
    assert first.choices[0].text == same.choices[0].text != other.choices[0].text
    assert first.choices[0].finish_reason == "length"


def test_the_serve_row_of_the_dashboard_has_data(served: Served) -> None:
    """Scraped from Ray's exporter, as Prometheus would; Ray reports every ten seconds."""
    served.ask()
    assert served.post("/v1/completions", json={"model": "no-such", "prompt": "1"}).is_error
    [node] = ray.nodes()
    exporter = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    monitoring_cases.check_serve_row(exporter, within_s=40)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_port_and_no_route_opens_without_a_key(served: Served, record_property: Any) -> None:
    """The endpoint's own and those of the Ray below it, one of which is on all interfaces."""
    found = doors(child.pid for child in psutil.Process().children(recursive=True))
    listing = "\n".join(map(str, found))
    assert {door.outcome for door in found if door.port == PORT} == {"refused"}, listing
    assert [str(door) for door in found if door.is_weak] == []
    assert answers_without_key(URL) == {"get /health"}
    record_property("endpoint_ports", len(found))


def test_a_cluster_that_has_an_endpoint_takes_no_second_one(served: Served) -> None:
    with pytest.raises(ConfigError, match=r"--address 127\.0\.0\.1:1: .* already"):
        endpoint._has_place("127.0.0.1:1", HTTPOptions())
    served.ask()


def test_a_request_that_leaves_does_not_stop_a_load(served: Served) -> None:
    """Its engine takes far longer to start than the client waits."""
    hurried = served.client.with_options(timeout=0.5)
    for _ in range(3):
        with pytest.raises(openai.APITimeoutError):
            hurried.completions.create(model="policy@1", prompt="1 + 2 =", max_tokens=2)
    assert served.ask("policy@1").model == "policy@1"
    headers = {"Authorization": f"Bearer {served.admin}"}
    engines = httpx.get(f"{URL}/admin/versions", headers=headers).json()["engines"]
    assert [engine["policy_version"] for engine in engines] == [1, 1]


def test_a_stream_carries_text_usage_and_versions(served: Served) -> None:
    whole = served.ask(max_tokens=20)
    chunks = list(served.ask(max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 20
    [last] = [c for c in chunks if c.choices and c.choices[0].finish_reason]
    assert last.policy_versions == [{"choice": 0, "policy_version": 1, "start": 0, "end": 20}]
    assert {c.model for c in chunks} == {"policy@1"}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": "x"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "1"}], "n": 17}, 400, "n"),
        ({"messages": [{"role": "user", "content": "1"}], "model": None}, 400, "model"),
        ({"messages": [{"role": "user", "content": "1"}], "temperature": -1}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "1"}], "max_tokens": 10**6}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "1"}], "kv_transfer_params": {}}, 400,
         "kv_transfer_params"),
        ({"messages": [{"role": "user", "content": "1" * 500}]}, 400, "input_tokens"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_as_openai_does(
    served: Served, body: dict[str, Any], status: int, param: str
) -> None:
    answer = served.post("/v1/chat/completions", json={"model": "policy", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_the_client_sees_the_right_exceptions(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.ask("policy@77")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as unknown:
        openai.OpenAI(base_url=f"{URL}/v1", api_key="hone-wrong").models.list()
    assert unknown.value.code == "invalid_api_key"
    assert served.post("/admin/release", json={"action": "follow"}).status_code == 403
    assert served.post("/v1/completions", content=b"{}" * 2**21, headers={
        "Content-Type": "application/json"}).status_code == 413  # fmt: skip
    assert served.post("/v1/completions", content=b'{"a":NaN}', headers={
        "Content-Type": "application/json"}).status_code == 400  # fmt: skip
    assert served.post("/pause").status_code == 404


def test_requests_live_through_weight_updates(served: Served) -> None:
    """Long answers across 6 updates: none fails, none is cut, spans are honest."""
    publisher = Publisher(served.run, first=2, count=6, every_s=0.5)

    async def load() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=served.query, max_retries=0)
        gate = asyncio.Semaphore(16)

        async def one(seed: int) -> Any:
            async with gate:
                return await client.completions.create(
                    model="policy", prompt="1 + 2 =", max_tokens=100, seed=seed,
                    temperature=1.0, extra_body={"ignore_eos": True},
                )  # fmt: skip

        publisher.start()
        return await asyncio.gather(*[one(seed) for seed in range(200)])

    answers = asyncio.run(load())
    publisher.join()
    crossed = 0
    for answer in answers:
        spans = answer.policy_versions
        assert answer.usage.completion_tokens == 100
        assert (spans[0]["start"], spans[-1]["end"]) == (0, 100)
        assert all(a["end"] == b["start"] for a, b in pairwise(spans))
        crossed += len(spans) > 1
    assert crossed > 0
    until(lambda: served.ask().model == "policy@7")


def test_the_weights_that_answer_are_the_published_ones(served: Served) -> None:
    """Log-probs of the endpoint equal those of the published file in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answer = served.ask(max_tokens=12, logprobs=0, extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    model = AutoModelForCausalLM.from_pretrained(served.run.policy, dtype=torch.float32)
    path = served.run.weights / "policy_00000007.safetensors"
    model.load_state_dict(load_file(path), strict=False)
    prompt = AutoTokenizer.from_pretrained(served.run.policy).encode("1 + 2 =")
    tokens = torch.tensor([prompt + choice.token_ids])
    with torch.no_grad():
        logprobs = model(tokens).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = logprobs.gather(1, tokens[0, len(prompt) :, None])[:, 0].numpy()
    assert np.abs(expected - np.array(choice.logprobs.token_logprobs)).max() < 1e-4


def test_a_broken_file_is_refused_and_the_old_version_goes_on(served: Served) -> None:
    tensors = load_file(served.run.policy / "model.safetensors")
    name = next(iter(tensors))
    put(served.run, 8, tensors | {name: torch.full_like(tensors[name], torch.nan)})
    until(lambda: bool(served.events("release_refused")))
    [event] = served.events("release_refused")
    assert event["version"] == 8
    assert "not finite" in str(event["reason"])
    assert served.ask().model == "policy@7"


def test_a_pinned_version_stays_while_the_policy_moves(served: Served) -> None:
    """The first pin starts a second engine; it answers with the old weights, exactly."""
    pinned = served.ask("policy@7", max_tokens=30)
    publish(served.run, 9)
    until(lambda: served.ask().model == "policy@9")
    again = served.ask("policy@7", max_tokens=30)
    assert again.model == "policy@7"
    assert again.choices[0].text == pinned.choices[0].text
    assert served.ask("policy@latest").model == "policy@9"


def test_a_canary_gets_its_share_and_is_promoted(served: Served) -> None:
    state = served.release(action="canary", version=7, share=0.25)
    assert (state["stable"], state["canary"], state["is_following"]) == (9, 7, False)
    models = [served.ask(max_tokens=1).model for _ in range(40)]
    assert models.count("policy@7") == 10
    assert models.count("policy@9") == 30
    assert served.release(action="promote")["stable"] == 7
    assert {served.ask(max_tokens=1).model for _ in range(4)} == {"policy@7"}
    assert served.release(action="rollback")["stable"] == 9
    assert served.ask(max_tokens=1).model == "policy@9"
    kinds = [event.kind for event in served.run.read_events()]
    assert {"release_canary", "release_promoted", "release_rolled_back"} <= set(kinds)


def test_an_eval_drop_rolls_a_canary_back_by_itself(served: Served) -> None:
    publish(served.run, 10)
    served.release(action="canary", version=10, share=0.5)  # a version is known once published
    served.run.append_metrics(9, {"policy_version": 9, "eval/pass@1": 0.8})
    served.run.append_metrics(10, {"policy_version": 10, "eval/pass@1": 0.3})
    until(lambda: served.state()["canary"] is None, timeout_s=10)
    state = served.state()
    assert (state["stable"], state["refused"]) == (9, [7, 8, 10])
    last = served.events("release_rolled_back")[-1]
    assert last["author"] == "guard"
    assert "held-out pass@1" in str(last["reason"])
    assert {served.ask(max_tokens=1).model for _ in range(4)} == {"policy@9"}


def test_every_documented_route_survives_fuzz(served: Served) -> None:
    """Never a 5xx, every refusal says why, and no bad release action changes anything."""
    document = httpx.get(f"{URL}/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/admin/release"} <= document["paths"].keys()
    assert dangling_references(document) == set()
    chat = document["components"]["schemas"]["ChatBody"]
    assert chat["properties"]["temperature"]["anyOf"][0] == {"type": "number"}
    before = served.state()
    fuzzed = fuzz(URL, served.query, served.admin, 400)
    assert (fuzzed.wrong, served.state()) == ([], before)
    assert (fuzzed.num_refused > 100, fuzzed.num_answered >= 400 // 50) == (True, True), fuzzed


def test_a_flood_is_refused_with_the_time_to_wait(served: Served) -> None:
    secret = KeyStore(served.run.path.parent / "keys.json").create(
        "flood", ["query"], requests_per_minute=5
    )
    body = {"model": "policy", "prompt": "1", "max_tokens": 1}
    answers = [served.post("/v1/completions", secret, json=body) for _ in range(10)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 5
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "4"


def test_the_admin_client_speaks_the_api(served: Served) -> None:
    with AdminClient(URL, served.admin) as admin:
        assert admin.runs() == Runs(runs=["demo"], served="demo")
        assert admin.release().stable == 9
        assert admin.metrics("demo", after=10)[0]["eval/pass@1"] == 0.3
        assert [v.policy_version for v in admin.versions().versions][-1] == 10
        assert admin.events("demo")[-1].kind == "release_rolled_back"
        with pytest.raises(AdminError, match="404 model_not_found"):
            admin.promote(77)
        with pytest.raises(AdminError, match="409 refused: run 'demo' must be training"):
            admin.swap_rewards("demo", ["correct.weight=0.5"])
        with pytest.raises(AdminError, match="404 not_found: step 3 is not in the ledger"):
            admin.why("demo", 3)
    with AdminClient(URL, served.query) as admin, pytest.raises(AdminError, match="403"):
        admin.release()


def test_a_conversation_in_the_terminal(served: Served) -> None:
    sink = io.StringIO()
    source = io.StringIO("1 + 2 =\n/new\n3 + 4 =\n\n")
    chat.talk(chat.connect(URL, served.query), "policy", source, sink, max_tokens=8)
    assert sink.getvalue().count("[policy@9]") == 2
    assert "\x1b" not in sink.getvalue()


@pytest.mark.skipif(browser.chromium() is None, reason="needs Chromium")
def test_the_page_shows_the_run_and_changes_the_release(served: Served) -> None:
    """Keys, curves, tokens, release buttons, the chosen version, phone width."""
    page_cases.write_known_run(served.run)
    with browser.Browser() as page:
        page_cases.check_keys(page, URL, served.query, served.admin)
        page_cases.check_tokens(page)
        page_cases.check_curves_move(page, served.run, 5)
        publish(served.run, 11)
        page.until("[...document.getElementById('version').options].some((o) => o.value == '11')")
        for action, version, words in (("promote", "11", "version 11"), ("canary", "9", "canary")):
            page.write("#version", version)
            page.click(f"[data-action={action}]")
            page.until(f"document.getElementById('release').textContent.includes('{words}')")
        models = [served.ask(max_tokens=1).model for _ in range(20)]
        assert (models.count("policy@11"), models.count("policy@9")) == (18, 2)
        page.click("[data-action=rollback]")
        page.until("document.getElementById('release').textContent.includes('fixed')")
        page_cases.check_a_choice_stays(page, served.run, 11)
        page_cases.check_controls(page)


def test_secrets_are_in_no_file_of_the_run(served: Served) -> None:
    for path in served.run.path.parent.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert served.query.encode() not in data, path
            assert served.admin.encode() not in data, path
