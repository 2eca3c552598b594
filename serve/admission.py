"""Who may send what, and how much of it: keys, sizes, rates and the queue bound.

Invariant: a request that is refused here has cost no engine time, and its refusal says when to come
again (429 with Retry-After) or which bound it broke (400, 413). Rates count per key and replica.
"""

# pyright: basic

import asyncio
import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec
from starlette.requests import ClientDisconnect, Request

from serve.api_errors import ApiError
from serve.api_keys import ApiKey, KeyStore, Scope
from serve.client_presence import CLIENT_LEFT
from serve.rates import Rate

MAX_DEPTH = 64
READ_S = 60.0  # for the whole body
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
ANONYMOUS = ApiKey(name="local", digest="", scopes=["query", "view", "admin"], created_at=0.0)

# What OpenAI documents, and vLLM's sampling extras that cost no more than they do.
_SAMPLING = {
    "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options",
    "logprobs", "presence_penalty", "frequency_penalty", "logit_bias", "user", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens",
    "return_token_ids",
}  # fmt: skip
FIELDS = {
    "chat": _SAMPLING
    | {"messages", "max_completion_tokens", "top_logprobs", "store", "metadata", "service_tier"},
    "completion": _SAMPLING | {"prompt", "echo"},
}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one replica. Rates are per key; 0 lifts a rate."""

    body_bytes: int = 2 * 2**20
    messages: int = 512
    choices: int = 16
    stops: int = 4
    requests_per_minute: int = 1200
    tokens_per_minute: int = 2_000_000
    running: int = 256
    queued: int = 512
    deadline_s: float = 300.0

    @property
    def places(self) -> int:
        """How many answers may run or wait at once; none is larger than that."""
        return self.running + self.queued


class Admission:
    """The door of one replica. Example: `key = admission.identify(request, "query")`."""

    def __init__(self, keys: KeyStore, limits: Limits, is_open: bool) -> None:
        self.limits = limits
        self.num_inside = 0
        self._keys = keys
        self._is_open = is_open
        self._rates: dict[tuple[str, str], tuple[Rate | None, Rate | None]] = {}

    def identify(self, request: Request, scope: Scope) -> ApiKey:
        """The key of a request; 401 without a valid one, 403 when it lacks `scope`, or, where no
        keys are asked for, when it does not name this machine.

        Who may change (`admin`) may look (`view`).
        """
        if self._is_open:
            _check_host(request.headers.get("host", ""))
            return ANONYMOUS
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        key = self._keys.find(secret.strip()) if kind.lower() == "bearer" and secret else None
        if key is None:
            raise ApiError(
                401, "a valid API key is required: Authorization: Bearer KEY",
                code="invalid_api_key",
            )  # fmt: skip
        if scope not in key.scopes and not (scope == "view" and "admin" in key.scopes):
            raise ApiError(403, f"this key lacks the scope {scope!r}", code="insufficient_scope")
        return key

    def charge_request(self, key: ApiKey) -> None:
        """Count one request; 429 when the key is above a rate."""
        for rate, cost in zip(self._rates_of(key), (1.0, 0.0), strict=True):
            wait_s = 0.0 if rate is None else rate.bucket.take(cost, time.monotonic())
            if rate is not None and wait_s > 0:
                raise ApiError(
                    429, f"rate limit: {rate.per_minute} {rate.what} per minute for this key",
                    code="rate_limit_exceeded", retry_after_s=wait_s,
                    headers=self.rate_headers(key),
                )  # fmt: skip

    def charge(self, key: ApiKey, *, requests: int = 0, tokens: int = 0) -> None:
        """Count what shows only after a request was let in; later requests wait for it."""
        for rate, cost in zip(self._rates_of(key), (requests, tokens), strict=True):
            if rate is not None:
                rate.bucket.level -= cost

    def rate_headers(self, key: ApiKey) -> dict[str, str]:
        """What is left for this key, as OpenAI's `x-ratelimit-*` headers."""
        rates = filter(None, self._rates_of(key))
        return {name: value for rate in rates for name, value in rate.headers().items()}

    @contextmanager
    def places(self, count: int) -> Generator[None]:
        """Places for `count` answers among those running and queued; 429 when they are taken."""
        bound = self.limits.places
        if self.num_inside + count > bound:
            raise ApiError(
                429, f"{self.num_inside} of {bound} places are taken, {count} are asked for",
                code="queue_full", retry_after_s=1.0,
            )  # fmt: skip
        self.num_inside += count
        try:
            yield
        finally:
            self.num_inside -= count

    def _rates_of(self, key: ApiKey) -> tuple[Rate | None, Rate | None]:
        """Requests and tokens of this key; None where there is no limit."""
        found = self._rates.get((key.name, key.digest))
        if found is None:
            limits = self.limits
            asked = key.requests_per_minute
            requests = limits.requests_per_minute if asked is None else asked
            tokens = limits.tokens_per_minute
            found = (
                Rate("requests", requests) if requests else None,
                Rate("tokens", tokens) if tokens else None,
            )
            self._rates[key.name, key.digest] = found
        return found


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object, strict: 415 no JSON type, 400 for anything else; and as
    `read_body`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")
    return parse_json(await read_body(request, max_bytes))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body: 408 too slow, 413 too large."""
    data = bytearray()
    try:
        async with asyncio.timeout(READ_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    raise ApiError(
                        413, f"the body must be at most {max_bytes} bytes", code="too_large"
                    )
    except TimeoutError:
        raise ApiError(408, f"the body did not come in {READ_S:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "the client has left", code="client_left") from None
    return bytes(data)


def parse_json(data: bytes) -> dict[str, Any]:
    """Strict JSON: an object, no NaN, no doubled keys, no lone surrogates, bounded depth."""
    try:
        text = data.decode("utf-8")
        body: object = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_doubles)
        _check(body, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ApiError(400, f"the body must be strict JSON: {reason[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def check_body(api: str, body: dict[str, Any], limits: Limits) -> int:
    """Bounds that hold before an engine sees the request; 400 with the field in `param`.

    Returns how many answers it asks for: its prompts, each counted `n` times.
    """
    unknown = sorted(body.keys() - FIELDS[api])
    if unknown:
        _refuse(unknown[0][:60], "is not a field of this request")
    if not isinstance(body.get("model"), str):
        _refuse("model", "must name a model (a string)")
    messages, stop, n = body.get("messages"), body.get("stop"), body.get("n")
    if api == "chat" and not (isinstance(messages, list) and messages):
        _refuse("messages", "must be a list of at least one message")
    if isinstance(messages, list) and len(messages) > limits.messages:
        _refuse("messages", f"must be at most {limits.messages} messages")
    if isinstance(stop, list) and (len(stop) > limits.stops or "" in stop):
        _refuse("stop", f"must be at most {limits.stops} strings that are not empty")
    most = min(limits.choices, limits.places)
    if n is not None and not (type(n) is int and 1 <= n <= most):
        _refuse("n", f"must be 1 to {most}")
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and not (type(value) is int and value >= 1):
            _refuse(name, "must be an integer of at least 1")
    stream = body.get("stream")
    if stream is not None and type(stream) is not bool:
        _refuse("stream", "must be true or false")
    seed = body.get("seed")
    if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
        _refuse("seed", "must be a 64-bit integer")
    prompt, num_answers = body.get("prompt"), n or 1
    if isinstance(prompt, list) and not all(type(part) is int for part in prompt):
        num_answers *= len(prompt)
    most = min(limits.messages, limits.places)
    if num_answers > most:
        _refuse("prompt", f"must be at most {most} prompts, each counted n times")
    return num_answers


def _check_host(host: str) -> None:
    """Without keys a browser must not be led here by a name of someone else's (DNS rebinding)."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in LOOPBACK:
        raise ApiError(
            403, f"Host {host[:80]!r}: with --no-auth it must be one of "
            f"{', '.join(sorted(LOOPBACK))}", code="host_not_allowed",
        )  # fmt: skip


def _refuse(param: str, reason: str) -> NoReturn:
    raise ApiError(400, f"{param}: {reason}", param=param)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _check(value: object, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        value.encode()  # a lone surrogate is not text
    elif isinstance(value, int | float):
        if not -(2**63) <= value < 2**63:
            raise ValueError("a number is out of range")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
