"""A process that speaks the chat-completions protocol over HTTP, for the tests of judges."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

# Says yes when the text between the markers holds the reference; obeys what stands outside them.
SERVER = r"""
import json, re, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATE = {"calls": 0, "mode": "ok", "fail": 0}

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def send(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k.replace("_", "-"), v)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.send(200, STATE)
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/mode":
            STATE.update(request); return self.send(200, STATE)
        STATE["calls"] += 1
        mode = STATE["mode"]
        if STATE["fail"] > 0:
            STATE["fail"] -= 1
            return self.send(*{"500": (500, {}), "429": (429, {})}[mode],
                             **({"retry_after": "1"} if mode == "429" else {}))
        if mode == "narrow" and "long" in str(request["messages"]): return self.send(400, {})
        if mode == "slow": time.sleep(3)
        if mode == "down": return self.send(503, {})
        if mode == "junk": return self.send(200, b"not json")
        if mode == "denied": return self.send(401, {"error": "no"})
        system, user = (m["content"] for m in request["messages"])
        begin, end = re.search(r"\[(candidate-\w+) begin\]", system), None
        inside = user.split(f"[{begin[1]} begin]\n")[1].split(f"\n[{begin[1]} end]")[0]
        outside = user.replace(inside, "")
        gold = (re.search(r"Reference answer: (.*)", user) or ["", "42"])[1]
        yes = gold in inside.split() or "obey" in outside
        text = {"prose": "I think so", "two": "Verdict: yes\nVerdict: no"}.get(
            mode, "yes" if yes else "no")
        choice = {"message": {"content": text}}
        if mode == "reason": choice["message"]["content"] = f"Because.\nVerdict: **{text}**"
        if mode in ("logprobs", "faint"):
            top = [{"token": "Yes", "logprob": -0.2231435513}, {"token": " no", "logprob": -1.6094379124}]
            if mode == "faint": top = [t | {"logprob": t["logprob"] - 2.302585093} for t in top]
            choice["logprobs"] = {"content": [{"token": "Yes", "logprob": -0.22, "top_logprobs": top}]}
        self.send(200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 2}})

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""  # noqa: E501


PRICES: dict[str, Any] = {"price_prompt": 2.0, "price_completion": 10.0}
CALL_COST = (100 * 2.0 + 2 * 10.0) / 1e6  # of the tokens that the server reports


class Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def mode(self, mode: str, fail: int = 0) -> None:
        httpx.post(f"{self.url}/mode", json={"mode": mode, "fail": fail, "calls": 0})

    @property
    def calls(self) -> int:
        return int(httpx.get(self.url).json()["calls"])


@contextmanager
def judge_server(folder: Path) -> Generator[Server]:
    path = folder / "server.py"
    path.write_text(SERVER)
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield Server(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait(10)
