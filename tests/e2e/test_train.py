"""The whole loop as a user runs it: the `hone` command, real Ray, vLLM, Redis and FSDP2.

One run serves the module (each start takes most of a minute), so the tests are one story in order:
train until Ctrl-C, go on at once to the end, evaluate.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.run_dir import RunDir
from cluster.status import read
from tests.processes import KINDS, kinds, left_of, processes_of
from tests.trace_collector import attributes, collecting

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
HONE = Path(sys.executable).parent / "hone"
QUICKSTART = ROOT / "deploy" / "configs" / "quickstart.yaml"
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "warm_start.examples=640", "tasks.train.settings.size=1000",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8",
    "tasks.skip_uniform=false", "run.checkpoint_every=2",
]  # fmt: skip


@dataclass(frozen=True)
class Interrupted:
    """What was left of a run after Ctrl-C."""

    place: Path
    output: str
    exit_code: int
    seconds_to_exit: float
    kinds_before: set[str]
    num_steps: int

    @property
    def run(self) -> Path:
        return self.place / "runs" / "demo"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    place = tmp_path_factory.mktemp("train")
    run = place / "runs" / "demo"
    process = start(place, "run.steps=100000", "eval.every=100000")
    deadline = time.monotonic() + 400
    while count_steps(run) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    before = set(kinds(processes_of(place)))
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    return Interrupted(
        place, output, process.returncode, time.monotonic() - sent, before, count_steps(run)
    )


@pytest.mark.slow
def test_an_interrupt_before_the_first_step_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, "warm_start.steps=100000")
    deadline = time.monotonic() + 200
    run = tmp_path / "runs" / "demo"
    while phase(run) != "warm_start" and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    sent = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert time.monotonic() - sent < 15
    assert "nothing saved yet" in output
    assert left_of(tmp_path) == {}


def test_two_ranks_and_two_engines_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/v1/traces")
        process = start(
            tmp_path, "run.steps=2", "learner.world_size=2", "rollout.workers=2",
            "rollout.program.use=prefix", "rollout.program.settings.tokens=4",
        )  # fmt: skip
        output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    run = tmp_path / "runs" / "demo"
    ends = {s.trace_id: attributes(s) for _, s in collector.spans if s.name == "group"}
    used = [trace_id for trace_id, end in ends.items() if end.get("step") == 1]
    assert len(used) == 4
    for trace_id in used:
        names = {span.name for _, span in collector.spans if span.trace_id == trace_id}
        assert names == {"group", "rollout", "score", "gradients"}
    roles = {role for role, _ in collector.spans}
    assert {"controller", "rollout-0", "rollout-1", "learner-0", "learner-1"} <= roles
    assert any(role.startswith("reward-") for role in roles)
    last = rows(run, "metrics.jsonl")[-1]
    assert last["step"] == 2
    assert last["guide/prefix_tokens"] == 4
    assert 0 <= float(str(last["guide/prefixed_pass_rate"])) <= 1
    assert float(str(last["ratio/mismatch_abs_mean"])) <= 1e-4
    assert float(str(last["sync/probe_error"])) <= 1e-4
    state = read(run)
    assert state is not None
    names = {actor.name for actor in state.actors}
    assert {"learner/0", "learner/1", "rollout/0", "rollout/1"} <= names


def test_an_interrupt_saves_the_state_and_leaves_no_process(
    interrupted: Interrupted, record_property: Callable[[str, float], None]
) -> None:
    record_property("seconds_to_exit", interrupted.seconds_to_exit)
    num_steps = interrupted.num_steps
    assert num_steps >= 3, interrupted.output
    assert interrupted.exit_code == 130, interrupted.output
    assert interrupted.seconds_to_exit < 15
    assert interrupted.kinds_before == KINDS.keys()
    assert left_of(interrupted.place) == {}
    assert (interrupted.run / "checkpoints" / f"step_{num_steps:06d}" / "COMPLETE").is_file()
    assert f"state saved at step {num_steps}\n" in interrupted.output


def test_it_goes_on_at_once_and_leaves_a_whole_run_directory(interrupted: Interrupted) -> None:
    num_steps = interrupted.num_steps + 2
    run = interrupted.run
    process = start(interrupted.place, f"run.steps={num_steps}", "eval.every=2", "--resume")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    metrics = rows(run, "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(num_steps + 1))
    for row in metrics[1:]:
        assert float(str(row["ratio/mismatch_abs_mean"])) <= 1e-4
        assert float(str(row["sync/probe_error"])) <= 1e-4
        assert row["policy_age/max"] == 0
    assert "eval/pass@1" in metrics[0]
    assert "eval/pass@1" in metrics[-1]
    ledger = rows(run, "ledger.jsonl")
    assert [record["step"] for record in ledger] == list(range(1, num_steps + 1))
    used = [group for record in ledger for group in record["group_ids"]]  # type: ignore[attr-defined]
    assert len(used) == len(set(used)) == 4 * num_steps
    events = rows(run, "events.jsonl")
    restored = [event["step"] for event in events if event["kind"] == "restored"]
    assert restored == [interrupted.num_steps]
    assert {"run_started", "sync", "checkpoint", "resumed", "run_finished"} <= {
        event["kind"] for event in events
    }
    assert (run / "checkpoints" / f"step_{num_steps:06d}" / "COMPLETE").is_file()
    assert "<svg" in (run / "report.html").read_text()
    assert left_of(interrupted.place) == {}
    assert not RunDir(run).weights.exists()


@pytest.mark.slow
def test_an_evaluation_of_the_run_agrees_with_its_own(interrupted: Interrupted) -> None:
    done = subprocess.run(
        [HONE, "eval", "demo", "--json"],
        cwd=interrupted.place, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_tasks"], result["k"], result["num_abstained"]) == (8, 4, 0)
    trained = float(str(rows(interrupted.run, "metrics.jsonl")[-1]["eval/pass@1"]))
    assert abs(result["pass@1"]["value"] - trained) <= 2 / 32  # same seeds, other batches


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [HONE, "train", str(QUICKSTART), "--run", "demo", *SMALL, *arguments],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def rows(run: Path, name: str) -> list[dict[str, object]]:
    file = run / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def phase(run: Path) -> str:
    state = read(run) if run.is_dir() else None
    return state.phase if state else ""


def count_steps(run: Path) -> int:
    """Distinct steps in the ledger."""
    return len({row["step"] for row in rows(run, "ledger.jsonl")}) if run.is_dir() else 0
