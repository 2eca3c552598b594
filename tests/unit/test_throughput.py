"""What the throughput harness and the soak are made of, on files and figures without an engine."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks import soak, throughput, trl_environment, trl_peer
from benchmarks.proofs import Timed
from benchmarks.stage_ceilings import Ceilings
from benchmarks.synced_steps import Turn, turn_of
from benchmarks.tailed import Tailed
from benchmarks.trl_environment import PeerRun
from cluster import config_file
from cluster.errors import StageError
from cluster.run_dir import RunDir

ROOT = Path(__file__).parents[2]


def test_the_peer_runs_without_hone() -> None:
    module = ast.parse((ROOT / "benchmarks" / "trl_peer.py").read_text())
    imported = {
        name.name.partition(".")[0]
        for node in module.body
        if isinstance(node, ast.Import)
        for name in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in module.body
        if isinstance(node, ast.ImportFrom)
    }
    assert imported <= sys.stdlib_module_names


def test_the_peers_own_packages_are_pinned_and_the_others_are_in_the_lock() -> None:
    lines = (ROOT / "requirements" / "trl.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    for name in ("torch", "transformers", "datasets", "jinja2", "packaging", "psutil"):
        assert re.search(rf"^{name}==", lock, re.MULTILINE), name


@pytest.mark.parametrize(("text", "reward"), [("17", 0.0), ("18", 1.0), ("8x", 0.0), ("", 0.0)])
def test_the_rule_pays_for_an_even_last_digit(text: str, reward: float) -> None:
    assert trl_peer.ends_even("", text, "2") == reward


def test_worked_answers_have_a_long_tail() -> None:
    lengths = [len(task.solution) for task in Tailed(size=4000, seed=3).load()]
    assert max(lengths) == 256
    cut = fmean(length == 256 for length in lengths)
    assert cut == pytest.approx((1 - 1 / 128) ** 256, abs=0.02)
    assert fmean(length < 14 for length in lengths) == pytest.approx(0.1, abs=0.02)
    assert fmean(lengths) == pytest.approx(111, abs=5)


def test_the_config_is_whole_and_compares_128_samples() -> None:
    config = config_file.load(throughput.CONFIG)
    assert config.rollout.groups_per_step * config.rollout.group_size == 128
    assert config.rollout.max_policy_age > 0, "Hone is measured as it runs by default"
    assert config.policy.dtype == "float32"
    for case in (throughput.LONG, throughput.SHORT):
        for size in case.micro_batches:
            assert (128 % size, size % config.rollout.group_size) == (0, 0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Four steps, the last with an evaluation."""
    run = RunDir.create(tmp_path, "run", "", exist_ok=False)
    for step, when in enumerate([0, 100, 110, 113, 117]):
        note(run, "sync", when, policy_version=step)
        row = {"rollout/completion_tokens_mean": 10.0 * step, "learner/busy_fraction": 0.9}
        row |= {"sync/pause_s": 0.01 * step, "sync/probe_s": 0.02}
        run.append_metrics(step, row | ({"eval/pass@1": 0.5} if step in (0, 4) else {}))
    return run


def note(run: RunDir, kind: str, when: float, **fields: object) -> None:
    with run.events.open("a") as file:
        file.write(json.dumps({"time": float(when), "kind": kind, **fields}) + "\n")


def test_a_turn_is_of_the_steps_after_the_first_and_without_the_evaluation(run: RunDir) -> None:
    turn = turn_of(run, num_first=2)
    assert turn.step_s == [3.0, 4.0]
    assert turn.tokens == 30.0
    assert turn.waits == pytest.approx(0.1)
    assert (turn.pause_s, turn.probe_s) == pytest.approx((0.03, 0.02))
    assert turn.ranks_idle is None


def test_ranks_that_say_how_long_they_worked_are_heard(run: RunDir) -> None:
    run.append_metrics(3, {"learner/compute_fraction": 0.8})
    assert turn_of(run, num_first=2).ranks_idle == pytest.approx(0.2)


def test_steps_beside_which_a_worker_is_prepared_do_not_count(run: RunDir) -> None:
    note(run, "standby_ready", 105)
    turn = turn_of(run, num_first=1)
    assert (turn.step_s, turn.tokens) == ([3.0, 4.0], 30.0)


def test_a_stand_by_without_room_disturbs_until_it_leaves(run: RunDir) -> None:
    note(run, "standby_ended", 105)
    assert turn_of(run, num_first=1).step_s == [3.0, 4.0]


def test_half_of_the_steps_must_be_left_to_count(run: RunDir) -> None:
    note(run, "standby_ready", 112)
    with pytest.raises(StageError, match="until step 3, which leaves 1 of 4 steps"):
        turn_of(run, num_first=0)


def turn(*step_s: float, waits: float = 0.05, ranks_idle: float | None = None) -> Turn:
    return Turn(step_s, 100.0, waits, pause_s=0.1, probe_s=0.02, ranks_idle=ranks_idle)


def peer(*step_s: float) -> PeerRun:
    return PeerRun(
        version="1", transformers="1", torch="1", threads=2, dtype="torch.float32",
        num_parameters=3_000_000, micro_batch=32, median_step_s=0.0, step_s=list(step_s),
        tokens=[12_800.0],
    )  # fmt: skip


def test_a_turn_counts_with_its_mean_step() -> None:
    ours, theirs = [turn(1.0, 1.0, 4.0), turn(3.0, 3.0, 3.0)], [peer(10.0, 10.0, 4.0)]
    row = throughput.faster("claim", throughput.LONG, ours, theirs, num_samples=128)
    assert row.measured.startswith("3.20x: Hone 51.2/s (turns of 2.00, 3.00 s a step")
    assert "TRL 1 16.0/s (turns of 8.00 s a step" in row.measured
    assert "micro-batches of 32, the fastest of 128, 32" in row.measured
    assert (row.verdict, row.bound) == ("falls short", "at least 4x; lengths within 10%")
    row = throughput.synced("sync", [turn(1.0, 1.0, 0.4)])
    assert "2.5% of a step" in row.measured
    assert row.verdict == "falls short"


def test_stages_alone_are_measured_before_and_after_the_runs() -> None:
    ages, turns = {"sync": 0, "by default": 1}, {"sync": turn(9.0), "by default": turn(2.0, 6.0)}
    before, after = Ceilings(2.0, 3.0), Ceilings(3.0, 4.0)
    row = throughput.overlapped(ages, turns, before, after)
    assert "by default (age 1): 4.00 s a step, 0.88" in row.measured
    assert "learn alone 3.50 s (3.00, 4.00)" in row.measured
    assert row.verdict == "holds"


def test_what_ranks_say_stands_beside_what_the_controller_sees() -> None:
    turns = {"sync": turn(1.0, waits=0.4), "async": turn(1.0, waits=0.04, ranks_idle=0.21)}
    row = throughput.waited(turns)
    assert (row.measured, row.verdict) == (
        "sync 40%, async 4% (ranks' own view 21%)",
        "holds",
    )


def test_the_slower_stage_bounds_a_step() -> None:
    assert Ceilings(generate_s=3.5, learn_s=2.4).bound_s == 3.5


def test_the_peer_is_given_the_tasks_of_the_run(tmp_path: Path) -> None:
    config = config_file.load(throughput.CONFIG, ["tasks.train.settings.size=3"])
    throughput.write_tasks(config, tmp_path / "tasks.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    tasks = Tailed(size=3, seed=1).load()
    assert [row["prompt"][-1]["content"] for row in rows] == [t.messages[0].content for t in tasks]
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)


def test_the_peer_does_not_run_with_what_hone_sets_for_its_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[str] = []

    def note(command: Sequence[str | Path], _cwd: Path, _timeout_s: float) -> Timed:
        found.extend(map(str, command))
        return Timed(1, 0.0, 0.0, "")

    monkeypatch.setattr(trl_environment, "environment", lambda: Path(sys.executable))
    monkeypatch.setattr(trl_environment, "run_timed", note)
    config = config_file.load(throughput.CONFIG, ["policy={type: pretrained, model: policy}"])
    with pytest.raises(StageError):
        trl_environment.measure(config, tmp_path / "tasks.jsonl", 128, 1)
    place = found.index(sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GOMP_SPINCOUNT", "3000")
    shown = subprocess.run(found[:place], capture_output=True, text=True, check=True).stdout
    assert "PATH=" in shown
    assert "OMP_NUM_THREADS" not in shown
    assert "GOMP_SPINCOUNT" not in shown


def test_an_environment_that_cannot_be_made_says_so() -> None:
    with pytest.raises(StageError, match="cannot be made"):
        trl_environment._run(["/no/such/uv", "venv"])
    with pytest.raises(StageError, match="no room"):
        trl_environment._run(["sh", "-c", "echo no room >&2; exit 1"])


def series(name: str, slope: float) -> list[tuple[float, soak.Sample]]:
    """Sixty minutes, a sample a minute, noise of +-3."""
    return [(60.0 * i, {name: 100.0 + slope * i + 3 * (-1) ** i}) for i in range(60)]


@pytest.mark.parametrize(
    ("name", "slope", "verdict"),
    [
        ("learner/0 MiB", 0.05, "holds"),
        ("learner/0 MiB", 0.5, "falls short"),
        ("learner/0 MiB", -0.5, "holds"),
        ("processes number", 0.2, "falls short"),
        ("Redis payloads KiB", 0.2, "holds"),
        ("Redis payloads KiB", 3.0, "falls short"),
    ],
)
def test_a_leak_is_a_slope_and_noise_is_none(name: str, slope: float, verdict: str) -> None:
    [row] = soak.verdicts(series(name, slope))
    assert row.verdict == verdict, row


def test_what_grows_only_at_the_start_is_flat() -> None:
    samples = [(60.0 * i, {"controller MiB": 100.0 + min(i, 10) * 10}) for i in range(60)]
    [row] = soak.verdicts(samples)
    assert row.verdict == "holds"


def test_too_few_samples_are_no_proof() -> None:
    with pytest.raises(ValueError, match="too few"):
        list(soak.verdicts(series("learner/0 MiB", 0.0)[:5]))
