"""`hone train` and `hone serve` of one run as a user starts them: two terminals, one machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.proofs import finish
from cluster import published
from cluster.run_dir import RunDir
from tests.browser import Browser

ROOT = Path(__file__).parents[1]
HONE = [sys.executable, "-c", "from serve.cli import main; main()"]
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "warm_start.examples=640", "tasks.train.settings.size=1000",
    # The policy gets nothing right, and a run of equal rewards ends: lengths vary, and go on to.
    "rewards.verifiers.short={use: length, weight: 0.1, settings: {max_tokens: 99}}",
    "learner.lr=1.0e-7",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8", "eval.every=100000",
    "tasks.skip_uniform=false", "run.steps=100000", "rollout.max_policy_age=1",
]  # fmt: skip
START_S = 400.0  # on two cores that others use, too
END_S = 60.0


class LiveRun:
    """A run that trains until it is interrupted, and an endpoint that follows it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.query = self.hone("keys", "create", "me").strip()
        self.admin = self.hone("keys", "create", "operator", "--scope", "admin").strip()
        config = ROOT / "deploy" / "configs" / "quickstart.yaml"
        self.train = self._start("train", str(config), "--run", "demo", *SMALL)
        self.serve: subprocess.Popen[str] | None = None

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "runs" / "demo")

    def open_endpoint(self) -> None:
        """Start `hone serve` as soon as the run exists, and wait until it answers."""
        self.until(self.run.config.is_file)
        self.serve = self._start(
            "serve", "demo", "--port", str(self._port), "limits.requests_per_minute=0"
        )
        self.until(self._answers)

    def hone(self, *arguments: str) -> str:
        """One `hone` command; its output."""
        done = subprocess.run(
            [*HONE, *arguments], cwd=self.folder, env=self._env, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask_as_the_readme_says(self) -> str:
        """What the README's client script prints."""
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        [script] = [block for block in blocks if "OpenAI" in block]
        env = {"OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": self.query}
        done = subprocess.run(
            [sys.executable, "-c", script], env=self._env | env, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def lines(self, name: str) -> list[dict[str, object]]:
        file = self.run.path / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def published_version(self) -> int:
        announced = published.read(self.run.weights)
        return -1 if announced is None else announced.policy_version

    def rubrics(self) -> set[str]:
        """Ordinals, as "2-", of the rubrics that scored what the run trained on."""
        rows = self.lines("ledger.jsonl")
        seen = [label for row in rows for label in row["reward_versions"]["rubric"]]  # type: ignore[index]
        return {f"{str(label).partition('-')[0]}-" for label in seen}

    def checkpoint_version(self) -> int:
        """The policy version of the newest checkpoint."""
        states = sorted(self.run.checkpoints.glob("step_*/state.json"))
        return int(json.loads(states[-1].read_text())["policy_version"])

    def swap_from_the_page(self, change: str) -> None:
        """Change the live rubric with the page's own controls."""
        with Browser() as page:
            page.sign_in(self.url, self.admin)
            page.until("document.querySelector('#rubric tr td')", 60)
            page.write("#changes", change)
            page.click("[data-reward=swap]")
            page.until("document.getElementById('reward-result').textContent.includes('2-')", 200)

    def until(self, condition: Callable[[], bool], timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            for process, name in ((self.train, "train"), (self.serve, "serve")):
                alive = process is None or process.poll() is None
                assert alive, (self.folder / f"{name}.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.2)

    def interrupt(self) -> int:
        """SIGTERM to `hone train`, as a job scheduler sends it; its exit code."""
        self.train.send_signal(signal.SIGTERM)
        return self.train.wait(END_S)

    def close(self) -> None:
        for process in (self.serve, self.train):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGINT)
        late = [finish(p, END_S) for p in (self.serve, self.train) if p is not None]
        assert not any(late), "a command did not end after Ctrl-C"

    def _start(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        log = (self.folder / f"{command}.log").open("w")
        return subprocess.Popen(
            [*HONE, command, *arguments], cwd=self.folder, env=self._env, stdout=log,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def _answers(self) -> bool:
        return f"policy endpoint: {self.url}" in (self.folder / "serve.log").read_text()


@contextmanager
def live_run(folder: Path, port: int) -> Iterator[LiveRun]:
    """Both commands started, the endpoint answering."""
    live = LiveRun(folder, port)
    try:
        live.open_endpoint()
        yield live
    finally:
        live.close()
