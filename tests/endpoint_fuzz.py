"""Random bodies, parameters and paths on every route of an endpoint's own API document."""

from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

JUNK: list[Any] = [
    None, True, -1, 0, 10**30, 2**62, 1e18, "", "\u0000", "x" * 3000, "policy@9", [], [[]], {},
    {"a": {}}, {"999999": 1}, {"-5": 9}, ["", 1], "../../etc/passwd", "\u00e9",
]  # fmt: skip
NAMES = ("demo", "..", "%2e%2e%2f", "a" * 300, "-1", "9" * 40)
CHANGES = ("canary", "promote", "rollback", "follow")
BASE = {"model": "policy", "prompt": "1", "max_tokens": 1}


@dataclass
class Fuzzed:
    """`broken` are answers of ours (5xx but 503), `mute` refusals without a message."""

    num_requests: int = 0
    num_refused: int = 0
    broken: list[str] = field(default_factory=list)
    mute: list[str] = field(default_factory=list)


def fuzz(url: str, keys: list[str], rounds: int) -> Fuzzed:
    """`rounds` requests over all documented routes, without release actions that would work."""
    document = httpx.get(f"{url}/openapi.json").json()
    routes = [(path, method) for path, methods in document["paths"].items() for method in methods]
    schemas = document["components"]["schemas"]
    bodies = [s["properties"] for n, s in schemas.items() if n.endswith(("Body", "Action"))]
    fields = sorted({name for properties in bodies for name in properties} | {"other"})
    random = np.random.default_rng(0)
    result = Fuzzed()
    with httpx.Client(base_url=url, timeout=60) as http:
        for number in range(rounds):
            path, method = routes[number % len(routes)]
            chosen = random.choice(fields, 3, replace=False)
            body = {name: JUNK[random.integers(len(JUNK))] for name in chosen}
            if random.random() < 0.5:
                body = BASE | body
            if body.get("action") in CHANGES:
                continue
            for name in ("run", "group", "step", "model"):
                path = path.replace(f"{{{name}}}", NAMES[random.integers(len(NAMES))])
            answer = http.request(
                method, path,
                params={"step": str(JUNK[random.integers(len(JUNK))])[:200]},
                headers={"Authorization": f"Bearer {keys[number // len(routes) % len(keys)]}"},
                **({"json": body} if method == "post" else {}),
            )  # fmt: skip
            _judge(result, answer, f"{method} {path} {body}")
    return result


def answers_without_key(url: str) -> set[str]:
    """Documented routes ("get /health") that do more for a stranger than ask for a key; the body
    that comes along is malformed, which only who has read it can complain of.
    """
    document = httpx.get(f"{url}/openapi.json").json()
    routes = [(path, method) for path, methods in document["paths"].items() for method in methods]
    told: set[str] = set()
    with httpx.Client(base_url=url, timeout=60) as http:
        for path, method in routes:
            asked = path.replace("{step}", "1").replace("{run}", "demo")
            body = b"{" if method == "post" else None
            if http.request(method, asked, params={"step": 1}, content=body).status_code != 401:
                told.add(f"{method} {path}")
    return told


def dangling_references(document: dict[str, Any]) -> set[str]:
    """Schemas that the document refers to and does not hold."""
    found: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                found.add(reference)
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(document)
    held = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    return found - held


def _judge(result: Fuzzed, answer: httpx.Response, asked: str) -> None:
    result.num_requests += 1
    if answer.status_code < 400:
        return
    result.num_refused += 1
    if answer.status_code >= 500 and answer.status_code != 503:
        result.broken.append(f"{answer.status_code} {asked} {answer.text[:300]}")
    elif not answer.json()["error"]["message"]:
        result.mute.append(asked)
