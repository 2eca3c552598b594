"""The whole loop as a user runs it: the `hone` command, real Ray, vLLM, Redis and FSDP2."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.run_dir import RunDir
from tests.processes import KINDS, kinds, processes_of

ROOT = Path(__file__).parents[2]
HONE = Path(sys.executable).parent / "hone"
QUICKSTART = ROOT / "deploy" / "configs" / "quickstart.yaml"
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "warm_start.examples=640", "tasks.train.settings.size=1000",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8", "eval.every=2",
    "tasks.skip_uniform=false", "run.checkpoint_every=2",
]  # fmt: skip


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [HONE, "train", str(QUICKSTART), "--run", "demo", *SMALL, *arguments],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def rows(run: Path, name: str) -> list[dict[str, object]]:
    file = run / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.timeout(600)
def test_trains_resumes_and_leaves_a_whole_run_directory(tmp_path: Path) -> None:
    process = start(tmp_path, "run.steps=2")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    run = tmp_path / "runs" / "demo"
    metrics = rows(run, "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    for row in metrics[1:]:
        assert float(str(row["ratio/mismatch_abs_mean"])) <= 1e-4
        assert float(str(row["sync/probe_error"])) <= 1e-4
        assert row["policy_age/max"] == 0
    assert "eval/pass@1" in metrics[0]
    assert "eval/pass@1" in metrics[2]
    assert [record["step"] for record in rows(run, "ledger.jsonl")] == [1, 2]
    kinds = {str(event["kind"]) for event in rows(run, "events.jsonl")}
    assert {"run_started", "sync", "checkpoint", "run_finished"} <= kinds
    assert (run / "checkpoints" / "step_000002" / "COMPLETE").is_file()
    assert "<svg" in (run / "report.html").read_text()
    assert processes_of(tmp_path) == {}
    assert not RunDir(run).weights.exists()

    process = start(tmp_path, "run.steps=3", "--resume")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert [record["step"] for record in rows(run, "ledger.jsonl")] == [1, 2, 3]
    used = [group for record in rows(run, "ledger.jsonl") for group in record["group_ids"]]  # type: ignore[attr-defined]
    assert len(used) == len(set(used)) == 12
    restored = [event for event in rows(run, "events.jsonl") if event["kind"] == "restored"]
    assert [event["step"] for event in restored] == [2]

    done = subprocess.run(
        [HONE, "eval", "demo", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_tasks"], result["k"], result["num_abstained"]) == (8, 4, 0)
    trained = float(str(rows(run, "metrics.jsonl")[-1]["eval/pass@1"]))
    assert abs(result["pass@1"]["value"] - trained) <= 2 / 32  # same seeds, other batches


@pytest.mark.timeout(480)
def test_an_interrupt_saves_the_state_and_leaves_no_process(
    tmp_path: Path, record_property: Callable[[str, float], None]
) -> None:
    """Ctrl-C, then at once a second run that goes on and is ended by SIGTERM."""
    run = tmp_path / "runs" / "demo"
    num_steps = 0
    for number, arguments in ((signal.SIGINT, []), (signal.SIGTERM, ["--resume"])):
        process = start(tmp_path, "run.steps=100000", "eval.every=100000", *arguments)
        deadline = time.monotonic() + 150
        while (done := count_steps(run)) <= num_steps and time.monotonic() < deadline:
            time.sleep(0.2)
        assert done > num_steps
        time.sleep(1.0)
        assert kinds(processes_of(tmp_path)) == KINDS.keys()
        interrupted = time.monotonic()
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        seconds_to_exit = time.monotonic() - interrupted
        record_property("seconds_to_exit", seconds_to_exit)
        assert process.returncode == 130, output
        assert seconds_to_exit < 15
        num_steps = count_steps(run)
        assert (run / "checkpoints" / f"step_{num_steps:06d}" / "COMPLETE").is_file()
        assert f"state saved at step {num_steps}\n" in output
        assert processes_of(tmp_path) == {}


def count_steps(run: Path) -> int:
    """Distinct steps in the ledger."""
    return len({row["step"] for row in rows(run, "ledger.jsonl")}) if run.is_dir() else 0
