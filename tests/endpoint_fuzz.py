"""Random bodies, parameters and paths on every route of an endpoint's own API document.

Invariant: a POST starts from a body that its route takes, so that what is drawn into it is read
past the first check; no release action that is sent may change anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

JUNK: list[Any] = [
    None, True, -1, 0, 10**30, 2**62, 1e18, "", "\u0000", "x" * 3000, "policy@9", [], [[]], {},
    {"a": {}}, {"999999": 1}, {"-5": 9}, ["", 1], "../../etc/passwd", "\u00e9",
]  # fmt: skip
PLAIN: list[Any] = [None, True, False, 0, 1, 0.5, "1", ["1"]]  # what many a field takes
NAMES = {"run": "demo", "group": "1", "step": "1", "model": "policy"}
JUNK_NAMES = ("..", "%2e%2e%2f", "a" * 300, "-1", "9" * 40)
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "policy", "messages": [{"role": "user", "content": "1"}], "max_tokens": 1,
    },
    "/v1/completions": {"model": "policy", "prompt": "1", "max_tokens": 1},
    "/admin/runs/{run}/rewards": {"action": "try"},
}  # fmt: skip
RELEASE = "/admin/release"
CHANGES = ("canary", "promote", "rollback", "follow")
UNKNOWN = 10**12  # a version number that is allowed, and nobody's
NO_VERSION: list[Any] = [-1, 10**30, 1e18, 0.5, "", "policy@9", [], {}]
NO_SHARE: list[Any] = [None, -1, 0, 1.5, 10**30, "", "x", [], {}]
POST_SHARE = 4  # a POST is asked as often as so many GETs
WRONG_KEYS = 0.1


@dataclass
class Fuzzed:
    """`num_answered` requests reached an engine and have its answer. `broken` are answers of ours
    (5xx), `mute` refusals without OpenAI's error object, `changed` release actions that were
    carried out.
    """

    num_requests: int = 0
    num_answered: int = 0
    num_refused: int = 0
    broken: list[str] = field(default_factory=list)
    mute: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [*self.broken, *self.mute, *self.changed]

    def add(self, answer: httpx.Response, asked: str) -> None:
        """Judge one answer to `asked`: "METHOD PATH BODY"."""
        self.num_requests += 1
        is_query = asked.startswith("post /v1/")
        if answer.status_code >= 500 or (is_query and 'data: {"error"' in answer.text):
            self.broken.append(f"{answer.status_code} {asked} {answer.text[:300]}")
        elif answer.status_code >= 400:
            self.num_refused += 1
            if not _message(answer):
                self.mute.append(f"{answer.status_code} {asked}")
        elif asked.startswith(f"post {RELEASE} "):
            self.changed.append(f"{answer.status_code} {asked}")
        else:
            self.num_answered += is_query


def fuzz(url: str, query: str, admin: str, rounds: int) -> Fuzzed:
    """`rounds` requests over all documented routes, mostly with the key that a route asks for:
    `query` under /v1, else `admin`.
    """
    document = httpx.get(f"{url}/openapi.json").json()
    routes = [
        (path, method, asked)
        for path, methods in document["paths"].items()
        for method, asked in methods.items()
        for _ in range(POST_SHARE if method == "post" else 1)
    ]
    random = np.random.default_rng(0)
    result = Fuzzed()
    with httpx.Client(base_url=url, timeout=60) as http:
        for number in range(rounds):
            path, method, asked = routes[number % len(routes)]
            params = {
                place["name"]: str(_value(random))[:200]
                for place in asked.get("parameters", [])
                if place["in"] == "query"
            }
            body = body_of(path, _fields(document, asked), random) if method == "post" else None
            for name, known in NAMES.items():
                given = _any(random, (known, _any(random, JUNK_NAMES)))
                path = path.replace(f"{{{name}}}", given)
            is_query = path.startswith("/v1/") != (random.random() < WRONG_KEYS)
            headers = {"Authorization": f"Bearer {query if is_query else admin}"}
            answer = http.request(method, path, params=params, headers=headers, json=body)
            result.add(answer, f"{method} {path} {body}")
    return result


def body_of(path: str, fields: list[str], random: np.random.Generator) -> dict[str, Any]:
    """A body for the POST route `path`: its base with junk in one or two of `fields`, or in one it
    does not know; a change of the release with a version or a share that must be refused.
    """
    if path != RELEASE:
        chosen = random.choice([*fields, "other"], random.integers(1, 3), replace=False)
        return BASES[path] | {str(name): _value(random) for name in chosen}
    action = _any(random, CHANGES)
    body = {"action": action, "version": UNKNOWN, "share": 0.5}
    if action == "follow" or random.random() < 0.5:
        name, junk = _any(random, (("version", NO_VERSION), ("share", NO_SHARE)))
        body[name] = _any(random, junk)
    if random.random() < 0.2:
        body[_any(random, ("action", "other"))] = _any(random, JUNK)
    return body


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


def _fields(document: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Names of the fields of a route's body."""
    reference = asked["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    return sorted(schema["properties"])


def _value(random: np.random.Generator) -> Any:
    return _any(random, _any(random, (JUNK, PLAIN)))


def _any(random: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(random.integers(len(choices)))]


def _message(answer: httpx.Response) -> str:
    """What a refusal says; empty when its body is not OpenAI's error object."""
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    return message if isinstance(message, str) else ""
