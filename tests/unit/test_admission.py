"""What the door refuses before an engine sees it: bodies, rates, places, scopes."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from serve import admission
from serve.admission import Admission, Limits, check_body, parse_json, read_json
from serve.api_errors import ApiError
from serve.api_keys import KeyStore
from serve.key_first import KeyFirst
from serve.rates import Bucket

# A busy machine draws slowly; that is no finding.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CHAT = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}


def problem(call: Callable[[], object]) -> ApiError | None:
    try:
        call()
    except ApiError as error:
        return error
    return None


def request(authorization: str, host: str = "127.0.0.1:8000") -> Request:
    headers = [(b"host", host.encode())]
    if authorization:
        headers.append((b"authorization", authorization.encode()))
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1, "a": 2}',
     b'{"a": "\\ud800"}', b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
     b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", b'\xef\xbb\xbf{}',
     b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": 1e999}', b'{"a": 18446744073709551616}',
    ],
)  # fmt: skip
def test_what_is_not_strict_json_is_a_400(data: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_json(data)
    assert refused.value.status == 400


@PATIENT
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_400(data: bytes) -> None:
    error = problem(lambda: parse_json(data))
    assert error is None or error.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@PATIENT
@given(
    st.dictionaries(
        st.sampled_from(["messages", "n", "stop", "seed", "stream", "max_tokens", "prompt"]), JSON
    )
)
def test_any_fields_pass_or_are_a_400_that_names_one(fields: dict) -> None:
    for api in ("chat", "completion"):
        body = CHAT | fields if api == "chat" else fields
        error = problem(lambda api=api, body=body: check_body(api, body, Limits()))
        assert error is None or (error.status, error.param in {*fields, *CHAT}) == (400, True)


@pytest.mark.parametrize(("leaves", "status"), [(True, 499), (False, 408)])
async def test_a_body_that_never_ends_is_no_failure_of_ours(
    monkeypatch: pytest.MonkeyPatch, leaves: bool, status: int
) -> None:
    monkeypatch.setattr(admission, "READ_S", 0.05)
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    messages += [{"type": "http.disconnect"}] if leaves else []

    async def receive() -> Message:
        return messages.pop(0) if messages else await asyncio.Future[Message]()

    headers = [(b"content-type", b"application/json")]
    with pytest.raises(ApiError) as refused:
        await read_json(Request({"type": "http", "headers": headers}, receive), 100)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("prompt", "n", "passes"),
    [(["1"] * 512, 1, True), (["1"] * 513, 1, False), (["1"] * 64, 16, False),
     ([[1, 2]] * 32, 16, True), ([1] * 4000, 16, True)],
)  # fmt: skip
def test_answers_of_one_request_are_bounded(prompt: list[object], n: int, passes: bool) -> None:
    body = {"model": "policy", "prompt": prompt, "n": n}
    error = problem(lambda: check_body("completion", body, Limits()))
    assert (error is None) == passes
    assert error is None or error.param == "prompt"


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": 7}])
def test_a_request_names_a_model(fields: dict[str, object]) -> None:
    error = problem(lambda: check_body("completion", {"prompt": "1", **fields}, Limits()))
    assert error is not None
    assert (error.status, error.param) == (400, "model")


def test_a_key_needs_its_scope(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    secret = keys.create("alice", ["query"])
    door = Admission(keys, Limits(), is_open=False)
    assert door.identify(request(f"Bearer {secret}"), "query").name == "alice"
    for header in ("", "Bearer", f"Basic {secret}", f"Bearer {secret[:-1]}"):
        with pytest.raises(ApiError) as refused:
            door.identify(request(header), "query")
        assert refused.value.status == 401
        assert refused.value.response().headers["www-authenticate"] == "Bearer"
    with pytest.raises(ApiError) as refused:
        door.identify(request(f"Bearer {secret}"), "admin")
    assert refused.value.status == 403
    assert secret not in json.dumps(refused.value.body())


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1:8000", True), ("localhost", True), ("LOCALHOST:9", True), ("[::1]:8000", True),
     ("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("", False), ("[", False),
     ("localhost@evil.example", False), ("192.168.0.7", False)],
)  # fmt: skip
def test_without_keys_only_this_machine_may_be_asked_for(
    tmp_path: Path, host: str, is_local: bool
) -> None:
    """A page elsewhere can point a name of its own at 127.0.0.1, but not the Host header."""
    door = Admission(KeyStore(tmp_path / "keys.json"), Limits(), is_open=True)
    error = problem(lambda: door.identify(request("", host), "admin"))
    assert (error is None) == is_local
    assert error is None or (error.status, error.code) == (403, "host_not_allowed")


def test_a_flood_is_a_429_that_says_when_to_come_again(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    limits = Limits(requests_per_minute=60, tokens_per_minute=600, running=1, queued=1)
    door = Admission(keys, limits, is_open=True)
    key = door.identify(request(""), "query")
    refusals = [problem(lambda: door.charge_request(key)) for _ in range(200)]
    [refused] = {error.status for error in refusals if error}
    assert (refused, refusals.index(next(filter(None, refusals)))) == (429, 60)
    headers = refusals[-1].response().headers
    assert int(headers["retry-after"]) >= 1
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-remaining-tokens"] == "600"
    with door.places(2), pytest.raises(ApiError) as full, door.places(1):
        pass
    assert (full.value.status, full.value.code) == (429, "queue_full")
    assert door.num_inside == 0


def test_a_key_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    slow = keys.create("slow", ["query"], requests_per_minute=2)
    fast = keys.create("fast", ["query"], requests_per_minute=0)
    door = Admission(keys, Limits(requests_per_minute=5, tokens_per_minute=0), is_open=False)
    for secret, allowed in ((slow, 2), (fast, 50)):
        key = door.identify(request(f"Bearer {secret}"), "query")
        refusals = [problem(lambda key=key: door.charge_request(key)) for _ in range(50)]
        assert refusals.count(None) == allowed


def test_who_may_change_may_look(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    viewer, admin = keys.create("viewer", ["view"]), keys.create("admin", ["admin"])
    door = Admission(keys, Limits(), is_open=False)
    assert door.identify(request(f"Bearer {admin}"), "view").name == "admin"
    assert door.identify(request(f"Bearer {viewer}"), "view").name == "viewer"
    assert problem(lambda: door.identify(request(f"Bearer {viewer}"), "admin")).status == 403
    assert problem(lambda: door.identify(request(f"Bearer {admin}"), "query")).status == 403


def test_tokens_already_spent_are_waited_for(tmp_path: Path) -> None:
    limits = Limits(requests_per_minute=0, tokens_per_minute=600)
    door = Admission(KeyStore(tmp_path / "keys.json"), limits, is_open=True)
    key = door.identify(request(""), "query")
    door.charge_request(key)
    door.charge(key, tokens=620)
    with pytest.raises(ApiError, match="600 tokens per minute") as refused:
        door.charge_request(key)
    assert refused.value.retry_after_s == pytest.approx(2.0, abs=0.2)


def test_a_request_costs_as_much_as_the_answers_it_asks_for(tmp_path: Path) -> None:
    limits = Limits(requests_per_minute=60, tokens_per_minute=0, running=8, queued=8)
    body = {"model": "policy", "prompt": ["1"] * 4, "n": 4}
    assert check_body("completion", body, limits) == 16
    assert check_body("completion", body | {"prompt": [1, 2, 3]}, limits) == 4
    assert check_body("chat", CHAT, limits) == 1
    assert problem(lambda: check_body("completion", body | {"prompt": ["1"] * 5}, limits))
    door = Admission(KeyStore(tmp_path / "keys.json"), limits, is_open=True)
    with door.places(15), pytest.raises(ApiError, match="15 of 16 places"), door.places(2):
        pass
    key = door.identify(request(""), "query")
    door.charge_request(key)
    door.charge(key, requests=69)
    with pytest.raises(ApiError, match="60 requests per minute") as refused:
        door.charge_request(key)
    assert refused.value.retry_after_s == pytest.approx(11.0, abs=0.2)


def test_a_bucket_never_gives_more_than_its_rate_and_its_savings() -> None:
    bucket = Bucket(rate=2.0, capacity=4.0)
    start = bucket._filled_at
    taken = [t for t in range(1000) if bucket.take(1.0, start + t / 100) == 0.0]
    assert len(taken) == 4 + int(9.99 * 2.0)


async def test_a_change_needs_a_key_before_its_body_is_read(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    may, may_not = keys.create("operator", ["admin"]), keys.create("guest", ["query"])
    sent: list[Message] = []
    reached: list[str] = []

    async def application(scope: Scope, receive: Receive, _send: Send) -> None:
        reached.append(scope["path"])
        if scope["path"].startswith("/admin/"):
            received.append(await receive())

    received: list[Message] = []
    chunks: list[Message] = []

    async def body() -> Message:
        assert chunks, "the body is read"
        return chunks.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    door = KeyFirst(application, Admission(keys, Limits(body_bytes=4), is_open=False))

    async def post(path: str, secret: str) -> None:
        headers = [(b"authorization", f"Bearer {secret}".encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await door(scope, body, send)

    for secret in ("", "hone-wrong", may_not):
        await post("/admin/release", secret)
    assert [m["status"] for m in sent if "status" in m] == [401, 401, 403]
    assert reached == []
    part: Message = {"type": "http.request", "body": b"{}", "more_body": True}
    chunks += [part, part, part]
    await post("/admin/release", may)
    assert ([m["status"] for m in sent if "status" in m][-1], reached) == (413, [])
    chunks[:] = [part, {**part, "more_body": False}]
    await post("/admin/release", may)
    assert [m["body"] for m in received] == [b"{}{}"]
    await post("/v1/completions", "")  # which asks by itself
    assert reached == ["/admin/release", "/v1/completions"]
