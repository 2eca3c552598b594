"""Rewards changed by `hone rewards` while `hone train` trains, with real engines."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-c", "from serve.cli import main; main()"]
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8", "eval.every=100000",
    "tasks.skip_uniform=false", "run.steps=100000", "rollout.max_policy_age=1",
]  # fmt: skip


@pytest.mark.timeout(400)
def test_a_run_swaps_and_rolls_back_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = ROOT / "deploy" / "configs" / "quickstart.yaml"
    process = subprocess.Popen(
        [*MAIN, "train", str(config), "--run", "demo", *SMALL],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    run = tmp_path / "runs" / "demo"

    def rewards(*arguments: str) -> str:
        done = subprocess.run(
            [*MAIN, "rewards", *arguments], cwd=tmp_path, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def lines(name: str) -> list[dict[str, object]]:
        file = run / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def until_steps(count: int) -> None:
        deadline = time.monotonic() + 150
        while len(lines("ledger.jsonl")) < count and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.2)

    until_steps(1)
    assert "1-" in rewards("swap", "demo", "correct.weight=0.5")
    until_steps(len(lines("ledger.jsonl")) + 3)
    rewards("rollback", "demo")
    until_steps(len(lines("ledger.jsonl")) + 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    swaps = [event for event in lines("events.jsonl") if event["kind"] == "reward_swapped"]
    assert [event["action"] for event in swaps] == ["swap", "rollback"]
    seen = [v for row in lines("ledger.jsonl") for v in row["reward_versions"]["rubric"]]  # type: ignore[index]
    assert {str(v).partition("-")[0] for v in seen} == {"1", "2"}
    used = [group for row in lines("ledger.jsonl") for group in row["group_ids"]]  # type: ignore[attr-defined]
    assert len(used) == len(set(used))
    state = json.loads(sorted(run.glob("checkpoints/step_*/state.json"))[-1].read_text())
    assert state["reward_versions"]["rubric"].startswith("1-")
