"""vLLM's own OpenAI-compatible server as a peer and as a judge, on one math thread.

Invariant: a server that does not answer is ended, and its last words are in the error. Started by
its module: the command `vllm` asks for the version of a package that CPU builds name differently.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from actors.placement import QUIET_ENV
from benchmarks.endpoint_load import free_port
from benchmarks.proofs import end

START_S = 300.0
ENV = QUIET_ENV | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


class Server(NamedTuple):
    process: "subprocess.Popen[bytes]"
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, number: signal.Signals) -> None:
        """To the server and its engine, which are one process group."""
        os.killpg(self.process.pid, number)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def vllm_server(model: Path, *options: str, niceness: int = 0) -> Generator[Server]:
    """The server of `model` with more of vLLM's `options`, once it answers.

    Raises `RuntimeError` when it has ended or does not answer within `START_S` seconds.
    """
    with tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log") as log:
        port = free_port()
        process = subprocess.Popen(
            ["nice", "-n", str(niceness),
             sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
             "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
             "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048",
             "--kv-cache-memory-bytes", str(2**28), "--distributed-executor-backend", "uni",
             "--disable-log-stats", "--disable-uvicorn-access-log", *options],
            env=os.environ | ENV, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        server = Server(process, port)
        try:
            deadline = time.monotonic() + START_S
            while not server.answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    words = Path(log.name).read_text(errors="replace")[-500:]
                    raise RuntimeError(f"vLLM's server does not answer: {words}")
                time.sleep(0.5)
            yield server
        finally:
            if process.poll() is None:
                server.send(signal.SIGCONT)  # one that was stopped could not end
            end(process)
