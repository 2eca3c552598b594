"""`hone chat` with the official client: what it asks, and what it does with a refusal."""

import io
import json
from typing import Any

import httpx
import pytest
from openai import OpenAI

from cluster.errors import ConfigError
from serve import chat, endpoint_cli

CHUNK = {
    "id": "1", "object": "chat.completion.chunk", "created": 0, "model": "policy@3",
    "choices": [{"index": 0, "delta": {"content": "3\x1b[2J"}}],
}  # fmt: skip


class Server:
    """Answers with one chunk, unless a question is `long` or the key is wrong."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.headers["authorization"] != "Bearer hone-right":
            return _refusal(401, "a valid API key is required")
        self.asked.append(json.loads(request.content))
        if self.asked[-1]["messages"][-1]["content"] == "long":
            return _refusal(400, "maximum context length is 144")
        text = f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n"
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    def client(self, key: str) -> OpenAI:
        http = httpx.Client(transport=httpx.MockTransport(self.answer))
        return OpenAI(base_url="http://endpoint/v1", api_key=key, max_retries=0, http_client=http)


def _refusal(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "code": None}})


def test_a_refused_question_is_told_and_not_kept() -> None:
    server, sink = Server(), io.StringIO()
    source = io.StringIO("1 + 2 =\nlong\nand now?\n\n")
    chat.talk(server.client("hone-right"), "policy", source, sink)
    assert "refused: maximum context length is 144 (/new starts over)" in sink.getvalue()
    assert sink.getvalue().count("[policy@3]") == 2
    assert "\x1b" not in sink.getvalue()
    contents = [message["content"] for message in server.asked[-1]["messages"]]
    assert contents == ["1 + 2 =", "3\x1b[2J", "and now?"]
    assert "max_tokens" not in server.asked[0], "what the context leaves"


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ConfigError, match="HONE_API_KEY"):
        chat.talk(Server().client("hone-wrong"), "policy", io.StringIO("hi\n"), io.StringIO())


@pytest.mark.parametrize(
    ("own", "other", "sent"),
    [("hone-a", "hone-b", "hone-a"), (None, "hone-b", "hone-b"), (None, "sk-b", "none")],
)
def test_only_keys_of_an_endpoint_are_sent(
    monkeypatch: pytest.MonkeyPatch, own: str | None, other: str, sent: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", other)
    monkeypatch.delenv("HONE_API_KEY", raising=False)
    if own is not None:
        monkeypatch.setenv("HONE_API_KEY", own)
    assert endpoint_cli._key() == sent
