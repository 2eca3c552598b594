"""A client for OpenAI-compatible chat endpoints that a judge can lean on.

Invariant: a call returns a checked completion or raises `EndpointError` within its deadline; an
endpoint that fails is left alone for a while (circuit breaker) and comes back by itself; equal
requests at temperature 0 are asked once. Used by `rewards.judge`; keys come from the environment
only and never appear in a message.
"""

import asyncio
import hashlib
import importlib
import json
import os
import random
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from cluster.errors import ConfigError, DeadlineError, HoneError

UNFIT = {400, 413, 422}  # the request's own problem: it says nothing about the endpoint
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_REPLY_BYTES = 1 << 20
MAX_CACHED = 10_000
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 8.0


class EndpointError(HoneError):
    """No usable answer: says nothing about the text that was to be judged."""


class UnfitRequest(EndpointError):
    """The endpoint works and refuses this one, for example because the prompt is too long."""


class EndpointTimeout(EndpointError, DeadlineError):
    """The last try, or the wait for a turn, took too long."""


class Alternative(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`first_token` holds the most likely first tokens, empty where the endpoint gives none; `cost`
    is in the unit of the prices, 0 for one that was kept from an equal request.
    """

    text: str
    first_token: list[Alternative] = []
    cost: float = 0.0


class _Failed(NamedTuple):
    """A try that another may mend, after the `wait_s` that the endpoint asks for."""

    why: str
    wait_s: float = 0.0
    is_late: bool = False


class Breaker:
    """Open for `open_s` after `threshold` failures in a row; then one call may try."""

    def __init__(self, threshold: int, open_s: float) -> None:
        self._threshold = threshold
        self._open_s = open_s
        self._failures = 0
        self._open_until = 0.0

    def check(self) -> None:
        left = self._open_until - time.monotonic()
        if left > 0:
            raise EndpointError(f"the endpoint is left alone for another {left:.1f} s")
        if self._failures >= self._threshold:
            self._open_until = time.monotonic() + self._open_s  # only this call tries

    def record(self, is_ok: bool) -> None:
        self._failures = 0 if is_ok else self._failures + 1
        if is_ok:
            self._open_until = 0.0
        elif self._failures >= self._threshold:
            self._open_until = time.monotonic() + self._open_s


class Endpoint:
    """One model behind `base_url` (`http://host:8000/v1`)."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str,
        call_timeout_s: float,
        retries: int,
        max_parallel: int,
        breaker: Breaker,
        prices: tuple[float, float],
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if api_key_env and api_key_env not in os.environ:
            raise ConfigError(f"api_key_env: the variable {api_key_env} is not set")
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model = model
        self._key_env = api_key_env
        self._call_timeout_s = call_timeout_s
        self._retries = retries
        self._parallel = asyncio.Semaphore(max_parallel)
        self._breaker = breaker
        self._prices = prices  # of a million prompt and completion tokens
        self._cache: OrderedDict[str, Answer] = OrderedDict()
        self._client: Any = None
        self._loop: object = None

    async def ask(
        self, messages: list[dict[str, str]], *, deadline: float, **sampling: Any
    ) -> Answer:
        """One completion. Raises `EndpointError`, at the latest at `deadline` (of the loop)."""
        request = {"model": self._model, "messages": messages, **sampling}
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if sampling.get("temperature") == 0 and key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        try:
            async with asyncio.timeout_at(deadline):
                await self._parallel.acquire()
        except TimeoutError:
            raise EndpointTimeout(self._url, "no turn in time (max_parallel)") from None
        try:
            answer = await self._try(request, deadline)
        finally:
            self._parallel.release()
        self._cache[key] = msgspec.structs.replace(answer, cost=0.0)
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return answer

    async def _try(self, request: Mapping[str, Any], deadline: float) -> Answer:
        pause_s, failed, attempt = FIRST_PAUSE_S, _Failed(""), 0
        for attempt in range(self._retries + 1):
            self._breaker.check()
            try:
                outcome = await self._post(request, deadline)
            except UnfitRequest:
                raise
            except EndpointError:
                self._breaker.record(False)
                raise
            if isinstance(outcome, Answer):
                self._breaker.record(True)
                return outcome
            failed = outcome
            self._breaker.record(False)
            if attempt == self._retries:
                break
            pause = max(failed.wait_s, random.uniform(0.5, 1.0) * pause_s)
            if asyncio.get_running_loop().time() + pause >= deadline:
                failed = failed._replace(why=f"{failed.why}, no time for another try")
                break
            await asyncio.sleep(pause)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        reason = f"gave up after {attempt + 1} tries: {failed.why}"
        if failed.is_late:
            raise EndpointTimeout(self._url, reason)
        raise EndpointError(f"{self._url}: {reason}")

    async def _post(self, request: Mapping[str, Any], deadline: float) -> "Answer | _Failed":
        """One try. Raises `EndpointError` for what no other try would mend."""
        httpx, client = self._http()
        headers = {"Authorization": f"Bearer {os.environ[self._key_env]}"} if self._key_env else {}
        try:
            now = asyncio.get_running_loop().time()
            async with asyncio.timeout_at(min(deadline, now + self._call_timeout_s)):
                response = await client.post(self._url, json=request, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            is_late = isinstance(error, (httpx.TimeoutException, TimeoutError))
            return _Failed(f"{type(error).__name__}: {error}"[:200], is_late=is_late)
        if response.status_code in RETRIED:
            hint = response.headers.get("retry-after", "")
            wait_s = min(LONGEST_PAUSE_S, float(hint)) if hint.isdigit() else 0.0
            return _Failed(f"status {response.status_code}", wait_s)
        if response.status_code != 200:
            kind = UnfitRequest if response.status_code in UNFIT else EndpointError
            raise kind(f"{self._url}: status {response.status_code}: {response.text[:200]!r}")
        try:
            return _read(response.content, self._prices)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            return _Failed(f"no chat completion: {type(error).__name__}: {error}"[:200])

    def _http(self) -> tuple[Any, Any]:
        """httpx and a client that belongs to the running event loop."""
        httpx: Any = importlib.import_module("httpx")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._client = httpx.AsyncClient(timeout=self._call_timeout_s, trust_env=False)
            self._loop = loop
        return httpx, self._client


def _read(body: bytes, prices: tuple[float, float]) -> Answer:
    if len(body) > MAX_REPLY_BYTES:
        raise ValueError(f"{len(body)} bytes")
    reply: dict[str, Any] = msgspec.json.decode(body)
    choice: dict[str, Any] = reply["choices"][0]
    usage: dict[str, int] = reply.get("usage") or {}
    spent = [int(usage.get(kind, 0)) for kind in ("prompt_tokens", "completion_tokens")]
    logprobs: dict[str, Any] = choice.get("logprobs") or {}
    tokens: list[dict[str, Any]] = logprobs.get("content") or []
    top: list[dict[str, Any]] = tokens[0].get("top_logprobs") or [] if tokens else []
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("the content is no text")
    return Answer(
        text=text,
        first_token=[Alternative(str(t["token"]), float(t["logprob"])) for t in top],
        cost=sum(price * count / 1e6 for price, count in zip(prices, spent, strict=True)),
    )
