"""An endpoint under test as its users hold it: a key for queries, one for changes."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from cluster.config import Config
from cluster.run_dir import RunDir
from serve import endpoint, endpoint_settings
from serve.api_keys import KeyStore
from tests.endpoint_cases import make_run, publish

PORT = 18231
URL = f"http://127.0.0.1:{PORT}"


class Served:
    def __init__(self, run: RunDir, query: str, admin: str) -> None:
        self.run, self.query, self.admin = run, query, admin
        self.client = openai.OpenAI(base_url=f"{URL}/v1", api_key=query, max_retries=0)

    def post(self, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.query}"}
        headers |= options.pop("headers", {})
        return httpx.post(URL + path, headers=headers, timeout=120, **options)

    def release(self, **action: Any) -> dict[str, Any]:
        answer = self.post("/admin/release", self.admin, json=action)
        assert answer.status_code == 200, answer.text
        return answer.json()["state"]

    def state(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.admin}"}
        return httpx.get(f"{URL}/admin/release", headers=headers).json()["state"]

    def events(self, kind: str) -> list[dict[str, object]]:
        return [event.fields for event in self.run.read_events() if event.kind == kind]

    def ask(self, model: str = "policy", **options: Any) -> Any:
        options = {"max_tokens": 8, "temperature": 1.0, "seed": 1} | options
        return self.client.completions.create(model=model, prompt="1 + 2 =", **options)


@contextmanager
def serving(config: Config, policy_dir: Path, runs: Path) -> Generator[Served]:
    """An endpoint of a run that has published version 1."""
    run = make_run(config, policy_dir, runs)
    publish(run, 1)
    keys = KeyStore(runs / "keys.json")
    query, admin = keys.create("tester", ["query"]), keys.create("operator", ["admin"])
    settings = endpoint_settings.resolve(
        str(run.path), runs=runs,
        overrides=["guards.window_s=20", "limits.requests_per_minute=0", "limits.running=64"],
    )  # fmt: skip
    with endpoint.running(settings, endpoint_settings.Door(port=PORT)):
        yield Served(run, query, admin)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
