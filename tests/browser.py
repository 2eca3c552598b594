"""A headless Chromium over its debugging protocol: enough to click, read and take a picture."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from websockets.sync.client import connect

START_S = 30.0


def chromium() -> str | None:
    """On PATH, where scripts/chromium can put it."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """Example: `with Browser() as page: page.go(url); page.run("document.title")`."""

    def __enter__(self) -> Self:
        program = chromium()
        assert program is not None
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        self._process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--remote-debugging-port=0",
             f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port_file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + START_S
        while not port_file.is_file() or not port_file.read_text():
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        port = int(port_file.read_text().splitlines()[0])
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
        target = next(page for page in pages if page["type"] == "page")
        self._socket = connect(target["webSocketDebuggerUrl"], max_size=None)
        self._calls = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=START_S))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return message["result"]

    def go(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call("Page.navigate", url=url)
        self.until(f"location.href.startsWith({url!r}) && document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; awaits a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str, timeout_s: float = 20.0) -> Any:
        """The first truthy value of an expression; true for an element."""
        deadline = time.monotonic() + timeout_s
        found = f"((value) => value instanceof Node || value)({script})"
        while not (value := self.run(found)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.1)
        return value

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({selector!r}).click()")

    def write(self, selector: str, text: str) -> None:
        """Put `text` into a field, as if typed."""
        self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.value = {text!r}; "
            "e.dispatchEvent(new Event('input', {bubbles: true})); "
            "e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def sign_in(self, url: str, key: str, *, width: int = 1280, height: int = 900) -> None:
        """Open the page of an endpoint with an admin key."""
        self.go(url, width=width, height=height)
        self.until("!document.getElementById('login').hidden")
        self.write("#key", key)
        self.click("#login button")
        self.until("!document.getElementById('main').hidden")

    def picture(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
