"""The fuzz of an endpoint judges what comes back, and asks for nothing that could be done."""

import httpx
import numpy as np
import pytest

from tests.endpoint_fuzz import BASES, CHANGES, RELEASE, UNKNOWN, Fuzzed, body_of

REFUSAL = {"error": {"message": "no", "type": "invalid_request_error"}}
FIELDS = ["action", "share", "version"]


@pytest.mark.parametrize(
    ("asked", "answer", "counted"),
    [
        ("post /v1/completions {}", httpx.Response(200, json={}), "num_answered"),
        ("post /v1/completions {}", httpx.Response(400, json=REFUSAL), "num_refused"),
        ("get /v1/models {}", httpx.Response(200, json={}), ""),
        ("post /v1/completions {}", httpx.Response(503, json=REFUSAL), "broken"),
        ("post /v1/completions {}", httpx.Response(200, text='data: {"error": 1}'), "broken"),
        ("get /health None", httpx.Response(500, text="Internal Server Error"), "broken"),
        ("get /x None", httpx.Response(404, text="<html>"), "mute"),
        ("get /x None", httpx.Response(404, json={"detail": "no"}), "mute"),
        ("get /x None", httpx.Response(404, json=["no"]), "mute"),
        ("get /x None", httpx.Response(404, json={"error": {"message": ""}}), "mute"),
        (f"post {RELEASE} {{}}", httpx.Response(200, json={}), "changed"),
    ],
)
def test_each_answer_is_counted_for_what_it_is(
    asked: str, answer: httpx.Response, counted: str
) -> None:
    fuzzed = Fuzzed()
    fuzzed.add(answer, asked)
    kinds = ("num_answered", "num_refused", "broken", "mute", "changed")
    assert fuzzed.num_requests == 1
    seen = {kind for kind in kinds if getattr(fuzzed, kind)}
    assert seen - {"num_refused"} == {counted} - {"num_refused", ""}
    assert bool(fuzzed.wrong) == (counted in ("broken", "mute", "changed"))


def test_release_actions_are_known_and_none_can_be_carried_out() -> None:
    random = np.random.default_rng(1)
    bodies = [body_of(RELEASE, FIELDS, random) for _ in range(2000)]
    assert {str(body["action"]) for body in bodies} >= set(CHANGES)
    for body in bodies:
        is_known = body["action"] in CHANGES and "other" not in body
        version, share = body["version"], body["share"]
        is_version = type(version) is int and 0 <= version <= UNKNOWN
        is_share = type(share) in (int, float) and 0 < share <= 1
        if is_known and is_version and is_share:  # reads as a change: of a version nobody has
            assert (body["action"] != "follow", version) == (True, UNKNOWN), body


@pytest.mark.parametrize("path", BASES)
def test_junk_is_drawn_into_a_body_that_the_route_takes(path: str) -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        body = body_of(path, [*BASES[path], "n", "user"], random)
        differing = [name for name, value in body.items() if BASES[path].get(name, ...) != value]
        assert body.keys() >= BASES[path].keys()
        assert len(differing) <= 2
