"""What the endpoint claims, measured: `make show AREA=serve`.

Rows on a run that trains come first (`benchmarks.show_serve_live`); the others use a run whose
weights a stand-in publishes. `hone serve` and plain `vllm serve` run side by side on one directory,
with equal engine arguments and at the niceness that Hone gives its workers.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import torch
from safetensors.torch import load_file

from actors.connection import NICENESS
from benchmarks.endpoint_load import Paired, Side, compare, free_port, until
from benchmarks.endpoint_traffic import PROMPT
from benchmarks.proofs import proven, put_on_path
from benchmarks.show import Part, Row, judged
from benchmarks.show_serve_live import live_rows
from benchmarks.vllm_server import vllm_server
from cluster import config_file
from cluster.run_dir import RunDir
from learners.policy_dir import prepare
from serve import endpoint, endpoint_settings
from serve.api_keys import KeyStore
from serve.client import AdminClient
from tests import browser, page_cases
from tests.conftest import TINY
from tests.endpoint_cases import make_run, publish, put
from tests.endpoint_fuzz import fuzz

MAX_OVERHEAD = 0.10
MAX_EXTRA_S = 0.015
FLOOD_PER_MINUTE = 60
PLAIN = ("--max-model-len", "128", "--max-num-seqs", "256")  # what the endpoint gives its engine


@dataclass(frozen=True)
class Published:
    """An endpoint of a run that publishes, and keys for it."""

    run: RunDir
    url: str
    query: str
    admin: str
    flood: str


def rows(quick: bool) -> Iterator[Row | Part]:
    """All rows; `quick` sends fewer requests."""
    missing = put_on_path("chromium", "chromium")
    yield Part("the endpoint of a run that trains", lambda: live_rows(quick, missing))
    yield Part("the endpoint of published weights", lambda: published_rows(quick, missing))
    yield proven(
        "asked, followed, swapped from the page, rolled back from the terminal, ended",
        ["tests/e2e/test_live_run.py"], "the tests pass",
    )  # fmt: skip
    yield proven(
        "two replicas behind one TLS port follow, hold a promotion and keep it over a restart",
        ["tests/integration/test_endpoint_replicas.py"], "the test passes",
    )  # fmt: skip
    yield proven(
        "a weight load that fails half-way leaves the version before",
        ["tests/integration/test_openai_engine.py"], "the tests pass",
    )  # fmt: skip


def published_rows(quick: bool, missing: str) -> Iterator[Row | Part]:
    """`missing` says why there is no Chromium."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        root = Path(folder)
        config = config_file.parse(TINY, "show_serve")
        texts = [f"{a} + {b} = {a + b}" for a in range(50) for b in range(50)]
        policy_dir = prepare(config.policy, texts, root / "cache", root / "tiny")
        run = make_run(config, policy_dir, root / "runs")
        stack.callback(shutil.rmtree, run.weights, ignore_errors=True)
        publish(run, 1)
        keys = KeyStore(root / "runs" / "keys.json")
        query, admin = keys.create("user", ["query"]), keys.create("operator", ["admin"])
        flood = keys.create("flood", ["query"], requests_per_minute=FLOOD_PER_MINUTE)
        settings = endpoint_settings.resolve(
            str(run.path), runs=root / "runs",
            max_engines=max(2, os.cpu_count() or 2),  # one math thread each, as vllm_server has
            overrides=["limits.requests_per_minute=0", "limits.tokens_per_minute=0",
                       "guards.window_s=10"],
        )  # fmt: skip
        door = endpoint_settings.Door(port=free_port())
        with endpoint.running(settings, door):
            served = Published(run, door.url, query, admin, flood)
            yield Part("load", lambda: load_rows(served, policy_dir, quick))
            yield Part("canary share", lambda: [_share(served, quick)])
            yield Part("a bad version goes by itself", lambda: [_bad_version(served)])
            yield Part("wrong key, wrong scope, no key", lambda: [_doors(served)])
            yield Part("random requests", lambda: [_fuzz(served, quick)])
            yield Part("a flood", lambda: [_flood(served)])
            yield Part("the page", lambda: [_page(served, missing)])


def load_rows(served: Published, policy_dir: Path, quick: bool) -> Iterator[Row]:
    with vllm_server(policy_dir, *PLAIN, niceness=NICENESS) as plain:
        theirs = Side(plain.url, "none", str(policy_dir))
        for clients, paired in compare(Side(served.url, served.query, "policy"), theirs, quick):
            yield from _compare(clients, paired)


def _share(served: Published, quick: bool) -> Row:
    run, url, admin = served.run, served.url, served.admin
    stable = publish_newer(run)
    until(lambda: _stable(url, admin) == stable)
    with AdminClient(url, admin) as client:
        client.promote(stable)
        publish(run, stable + 1)
        until(lambda: stable + 1 in _known(url, admin))
        client.start_canary(stable + 1, 0.1)
    number = 500 if quick else 5000

    async def ask_all() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=served.query, max_retries=0)
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


def _bad_version(served: Published) -> Row:
    """A version whose held-out score falls, as a canary, and one whose file holds NaN."""
    run, url, admin = served.run, served.url, served.admin
    good = publish_newer(run)
    bad = good + 1
    with AdminClient(url, admin) as client:
        until(lambda: good in _known(url, admin))
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


def _doors(served: Published) -> Row:
    def status(path: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{served.url}{path}", headers=headers).status_code

    none = httpx.post(f"{served.url}/v1/completions", json={}).status_code
    released = httpx.post(
        f"{served.url}/admin/release",
        json={"action": "follow"},
        headers={"Authorization": f"Bearer {served.query}"},
    ).status_code
    got = (status("/v1/models", "x"), status("/admin/runs", served.query), released, none)
    bound = (401, 403, 403, 401)
    return judged("wrong key, wrong scope, no key", f"{got}", f"{bound}", got == bound)


def _fuzz(served: Published, quick: bool) -> Row:
    rounds = 300 if quick else 2000
    fuzzed = fuzz(served.url, served.query, served.admin, rounds)
    return judged(
        "random bodies, parameters and paths on every documented route",
        f"{fuzzed.num_requests} requests, {fuzzed.num_answered} answered by an engine, "
        f"{fuzzed.num_refused} refused; {len(fuzzed.broken)} failures of ours, "
        f"{len(fuzzed.mute)} refusals without a message, {len(fuzzed.changed)} bad release "
        "actions carried out",
        f"{rounds // 50} reach an engine; no 5xx, each refusal has a message, no bad action is "
        "carried out", not fuzzed.wrong and fuzzed.num_answered >= rounds // 50,
        "; ".join(fuzzed.wrong[:2]),
    )  # fmt: skip


def _flood(served: Published) -> Row:
    body = {"model": "policy", "prompt": "1", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {served.flood}"}

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            asked = [client.post(f"{served.url}/v1/completions", json=body) for _ in range(200)]
            return await asyncio.gather(*asked)

    started = time.monotonic()
    answers = asyncio.run(ask_all())
    refilled = FLOOD_PER_MINUTE * (time.monotonic() - started) / 60
    statuses = Counter(answer.status_code for answer in answers)
    late = [a for a in answers if a.status_code == 429 and "retry-after" not in a.headers]
    is_held = statuses.keys() == {200, 429} and statuses[200] <= FLOOD_PER_MINUTE + refilled + 1
    return judged(
        f"200 requests at once with a key of {FLOOD_PER_MINUTE} a minute",
        f"{statuses[200]} answered, {statuses[429]} refused with 429, {len(late)} without "
        "Retry-After", f"{FLOOD_PER_MINUTE} answered, the others 429", is_held and not late,
    )  # fmt: skip


def _page(served: Published, missing: str) -> Row:
    claim = (
        "curves move, tokens of a known trajectory are right, a promotion takes effect, a refused "
        "key is told of, a chosen version stays chosen, 375 px"
    )
    if browser.chromium() is None:
        return Row(claim, "-", "all true in Chromium", "not shown here", missing)
    page_cases.write_known_run(served.run)
    newest = publish_newer(served.run)
    with browser.Browser() as page:
        page_cases.check_keys(page, served.url, served.query, served.admin)
        page_cases.check_tokens(page)
        page_cases.check_curves_move(page, served.run, 5)
        has = f"[...document.getElementById('version').options].some((o) => o.value == '{newest}')"
        page.until(has)
        page.write("#version", str(newest))
        page.click("[data-action=promote]")
        page.until(f"document.getElementById('release').textContent.includes('{newest}, fixed')")
        page_cases.check_a_choice_stays(page, served.run, newest)
        page_cases.check_controls(page)
    is_promoted = _stable(served.url, served.admin) == newest
    return judged(claim, "all true in Chromium", "all true in Chromium", is_promoted)


def _compare(clients: int, paired: Paired) -> Iterator[Row]:
    ours, theirs = paired.ours, paired.theirs
    rounds = f"{len(paired.rounds)} paired rounds, {ours.num_requests} requests a side"
    ratio, extra_s = paired.tokens_ratio, paired.extra_p50_s
    yield judged(
        f"tokens/s with {clients} clients beside vllm serve, {rounds}",
        f"{ratio:.0%} in the median pair ({ours.tokens_per_s:.0f} against "
        f"{theirs.tokens_per_s:.0f})",
        f"at least {1 - MAX_OVERHEAD:.0%}", ratio >= 1 - MAX_OVERHEAD,
    )  # fmt: skip
    yield judged(
        f"time to first token with {clients} clients, p50 (p99), {rounds}",
        f"{1e3 * extra_s:+.0f} ms in the median pair ({1e3 * ours.p50_s:.0f} "
        f"({1e3 * ours.p99_s:.0f}) ms against {1e3 * theirs.p50_s:.0f} "
        f"({1e3 * theirs.p99_s:.0f}) ms)",
        f"{1e3 * MAX_EXTRA_S:.0f} ms more at p50", extra_s <= MAX_EXTRA_S,
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
