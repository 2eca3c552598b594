"""What the endpoint claims, measured: `make show AREA=serve`.

Two engines are compared in one run: `hone serve MODEL_DIR` and plain `vllm serve` on the same
directory, one after the other, with the same client, prompts and engine arguments.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from safetensors.torch import load_file

from benchmarks.endpoint_load import (
    PROMPT,
    TOKENS,
    Load,
    free_port,
    measure,
    plain_vllm,
    until,
)
from benchmarks.show import Row
from cluster import config_file
from cluster.run_dir import RunDir
from learners.policy_dir import prepare
from serve import endpoint, endpoint_settings
from serve.api_keys import KeyStore
from serve.client import AdminClient
from tests.conftest import TINY
from tests.endpoint_cases import Publisher, make_run, publish, put

MAX_OVERHEAD = 0.10
MAX_EXTRA_S = 0.015


def rows(quick: bool) -> Iterator[Row]:
    """All rows; `quick` sends fewer requests."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = config_file.parse(TINY, "show_serve")
        texts = [f"{a} + {b} = {a + b}" for a in range(50) for b in range(50)]
        policy_dir = prepare(config.policy, texts, root / "cache", root / "tiny")
        run = make_run(config, policy_dir, root / "runs")
        publish(run, 1)
        keys = KeyStore(root / "runs" / "keys.json")
        query, admin = keys.create("user", ["query"]), keys.create("operator", ["admin"])
        limited = keys.create("flood", ["query"])
        settings = endpoint_settings.resolve(
            str(run.path), runs=root / "runs",
            overrides=["limits.requests_per_minute=0", "limits.tokens_per_minute=0",
                       "guards.window_s=10"],
        )  # fmt: skip
        door = endpoint_settings.Door(port=free_port())
        with endpoint.running(settings, door):
            yield _while_weights_move(run, door.url, query, quick)
            ours = measure(door.url, query, "policy", quick)
            yield _doors(door.url, query)
            yield _share(door.url, query, admin, run, quick)
            yield _bad_version(door.url, admin, run)
        with plain_vllm(policy_dir) as url:
            theirs = measure(url, "none", str(policy_dir), quick)
        for clients in ours:
            yield from _compare(clients, ours[clients], theirs[clients])
        yield from _flood(settings, limited)
    yield Row("a reward swap from the page takes effect in the run", "-", "takes effect",
              "not shown here", "the page has no reward routes yet")  # fmt: skip


def _while_weights_move(run: RunDir, url: str, key: str, quick: bool) -> Row:
    num_requests, num_syncs = (400, 5) if quick else (2000, 20)
    publisher = Publisher(run, first=2, count=num_syncs, every_s=0.5 if quick else 1.0)

    async def ask_all() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)
        gate = asyncio.Semaphore(32)

        async def one(seed: int) -> Any:
            async with gate:
                return await client.completions.create(
                    model="policy", prompt=PROMPT, max_tokens=TOKENS, seed=seed, temperature=1.0,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip

        publisher.start()
        done = await asyncio.gather(*map(one, range(num_requests)), return_exceptions=True)
        return done

    answers = asyncio.run(ask_all())
    publisher.join()
    whole = [a for a in answers if not isinstance(a, BaseException)]
    failed = len(answers) - len(whole)
    cut = sum(a.usage.completion_tokens != TOKENS for a in whole)
    dishonest = sum(not _covers(a.policy_versions) for a in whole)
    crossed = sum(len(a.policy_versions) > 1 for a in whole)
    seen = {s["policy_version"] for a in whole for s in a.policy_versions}
    measured = (
        f"{failed} failed, {cut} truncated, {dishonest} without whole spans; "
        f"{len(seen)} versions answered, {crossed} answers span two or more"
    )
    is_shown = failed == cut == dishonest == 0 and crossed > 0
    return Row(
        f"{num_requests} requests while {num_syncs} versions are published", measured,
        "0 failed, 0 truncated, honest spans", "holds" if is_shown else "falls short",
        "weights are published by a stand-in for the trainer",
    )  # fmt: skip


def _covers(spans: list[dict[str, int]]) -> bool:
    ends = [0, *[span["end"] for span in spans]]
    return ends[-1] == TOKENS and all(s["start"] == e for s, e in zip(spans, ends, strict=False))


def _share(url: str, query: str, admin: str, run: RunDir, quick: bool) -> Row:
    stable = publish_newer(run)
    until(lambda: _stable(url, admin) == stable)
    with AdminClient(url, admin) as client:
        client.promote(stable)
        publish(run, stable + 1)
        until(lambda: stable + 1 in _known(url, admin))
        client.start_canary(stable + 1, 0.1)
    number = 500 if quick else 5000

    async def ask_all() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=query, max_retries=0)
        gate = asyncio.Semaphore(32)

        async def one(_: int) -> str:
            async with gate:
                answer = await client.completions.create(
                    model="policy", prompt=PROMPT, max_tokens=1
                )
                return answer.model

        return await asyncio.gather(*map(one, range(number)))

    share = asyncio.run(ask_all()).count(f"policy@{stable + 1}") / number
    with AdminClient(url, admin) as client:
        client.roll_back()
        client.follow()
    verdict = "holds" if abs(share - 0.1) <= 0.02 else "falls short"
    bound = "10 % within 2 points"
    return Row(f"canary share over {number} requests", f"{share:.2%}", bound, verdict)


def _bad_version(url: str, admin: str, run: RunDir) -> Row:
    """A version whose held-out score falls, as a canary, and one whose file holds NaN."""
    good = publish_newer(run)
    bad = good + 1
    with AdminClient(url, admin) as client:
        client.promote(good)
        publish(run, bad)
        until(lambda: bad in _known(url, admin))
        client.start_canary(bad, 0.5)
        run.append_metrics(good, {"policy_version": good, "eval/pass@1": 0.8})
        run.append_metrics(bad, {"policy_version": bad, "eval/pass@1": 0.2})
        started = time.monotonic()
        until(lambda: client.release().canary is None)
        eval_s = time.monotonic() - started
        client.follow()
        tensors = load_file(run.policy / "model.safetensors")
        broken = {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}
        started = time.monotonic()
        put(run, bad + 1, broken)
        until(lambda: bad + 1 in client.release().refused)
        nan_s = time.monotonic() - started
    measured = f"rolled back {eval_s:.1f} s after its eval; a NaN file refused after {nan_s:.1f} s"
    verdict = "holds" if max(eval_s, nan_s) <= 10 else "falls short"
    return Row("a bad version goes by itself", measured, "10 s (guards.window_s)", verdict)


def _doors(url: str, query: str) -> Row:
    wrong = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer x"}).status_code
    scope = httpx.get(f"{url}/admin/runs", headers={"Authorization": f"Bearer {query}"}).status_code
    none = httpx.post(f"{url}/v1/completions", json={}).status_code
    got = (wrong, scope, none)
    verdict = "holds" if got == (401, 403, 401) else "falls short"
    return Row("wrong key, wrong scope, no key", f"{got}", "(401, 403, 401)", verdict)


def _flood(settings: Any, secret: str) -> Iterator[Row]:
    """The door alone, without an engine: 300 requests at 60 a minute."""
    from starlette.requests import Request

    from serve.admission import Admission, Limits
    from serve.api_errors import ApiError

    door = Admission(KeyStore(settings.keys), Limits(requests_per_minute=60), is_open=False)
    header = (b"authorization", f"Bearer {secret}".encode())
    key = door.identify(Request({"type": "http", "headers": [header]}), "query")
    statuses: list[int] = []
    for _ in range(300):
        try:
            door.charge_request(key)
            statuses.append(200)
        except ApiError as error:
            statuses.append(error.status)
    refused = statuses.count(429)
    verdict = "holds" if refused >= 300 - 122 and statuses[0] == 200 else "falls short"
    yield Row("300 requests at once, 60 a minute allowed", f"{refused} refused with 429",
              "all beyond the burst of 120", verdict)  # fmt: skip


def _compare(clients: int, ours: Load, theirs: Load) -> Iterator[Row]:
    ratio = ours.tokens_per_s / theirs.tokens_per_s
    verdict = "holds" if ratio >= 1 - MAX_OVERHEAD else "falls short"
    yield Row(
        f"tokens/s with {clients} clients beside vllm serve",
        f"{ours.tokens_per_s:.0f} against {theirs.tokens_per_s:.0f} ({ratio:.0%})",
        f"at least {1 - MAX_OVERHEAD:.0%}", verdict,
    )  # fmt: skip
    extra_s = ours.p50_s - theirs.p50_s
    yield Row(
        f"time to first token with {clients} clients, p50 (p99)",
        f"{1e3 * ours.p50_s:.0f} ({1e3 * ours.p99_s:.0f}) ms against "
        f"{1e3 * theirs.p50_s:.0f} ({1e3 * theirs.p99_s:.0f}) ms",
        f"{1e3 * MAX_EXTRA_S:.0f} ms more at p50",
        "holds" if extra_s <= MAX_EXTRA_S else "falls short",
    )  # fmt: skip


def publish_newer(run: RunDir) -> int:
    """Publish one version above all published ones; returns it."""
    newest = max(int(p.stem.split("_")[1]) for p in run.weights.glob("policy_*.safetensors"))
    publish(run, newest + 1)
    return newest + 1


def _stable(url: str, admin: str) -> int | None:
    with AdminClient(url, admin) as client:
        return client.release().stable


def _known(url: str, admin: str) -> list[int]:
    with AdminClient(url, admin) as client:
        return [version.policy_version for version in client.versions().versions]
