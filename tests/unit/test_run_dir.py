"""The run directory: creation rules, JSONL files that survive crashes, and the logs in it."""

import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from cluster import log
from cluster.errors import ConfigError
from cluster.run_dir import JsonLines, RunDir, Sample
from cluster.types import Verdict


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "demo", "run: {}\n", exist_ok=False)


@pytest.fixture
def restored_root_logger():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_weights_are_found_through_a_link_to_the_folder_of_runs(run: RunDir, tmp_path: Path):
    (tmp_path / "elsewhere").symlink_to(run.path.parent)
    assert RunDir(tmp_path / "elsewhere" / "demo").weights == run.weights


def test_create_writes_the_config_and_becomes_latest(run: RunDir):
    assert run.config.read_text() == "run: {}\n"
    assert run.logs.is_dir()
    latest = run.path.parent / "latest"
    assert latest.is_symlink()
    assert latest.resolve() == run.path.resolve()


def test_the_newest_run_is_the_latest(run: RunDir):
    RunDir.create(run.path.parent, "second", "", exist_ok=False)
    assert RunDir.open(None, run.path.parent).name == "second"
    RunDir.create(run.path.parent, "demo", "", exist_ok=True)
    assert RunDir.open(None, run.path.parent).name == "demo"


def test_an_existing_run_needs_resume(run: RunDir):
    with pytest.raises(ConfigError, match=r"--resume.*--run NEW"):
        RunDir.create(run.path.parent, "demo", "new", exist_ok=False)
    assert run.config.read_text() == "run: {}\n"
    RunDir.create(run.path.parent, "demo", "new", exist_ok=True)
    assert run.config.read_text() == "new"


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "latest", "a b", "-x"])
def test_a_run_name_must_be_a_plain_folder_name(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=r"run\.name must be"):
        RunDir.create(tmp_path, name, "", exist_ok=False)
    assert list(tmp_path.iterdir()) == []


def test_at_writes_nothing(tmp_path: Path):
    assert RunDir.at(tmp_path / "runs", "demo", exist_ok=False).name == "demo"
    assert list(tmp_path.iterdir()) == []


def test_open_by_name_path_and_latest(run: RunDir):
    parent = run.path.parent
    for reference in ("demo", str(run.path), None):
        assert RunDir.open(reference, parent).path == run.path.resolve()
    with pytest.raises(ConfigError, match=r"no run 'nope' .*runs there: demo\)"):
        RunDir.open("nope", parent)
    with pytest.raises(ConfigError, match="none yet"):
        RunDir.open(None, parent / "empty")


def test_a_real_directory_named_latest_is_left_alone(tmp_path: Path):
    (tmp_path / "latest").mkdir()
    RunDir.create(tmp_path, "demo", "", exist_ok=False)
    assert not (tmp_path / "latest").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"latest", "demo"}


def test_events_keep_their_fields(run: RunDir):
    run.append_event("sync", policy_version=3, pause_s=0.5)
    run.append_event("worker_died", worker="rollout/0")
    first, second = run.read_events()
    assert (first.kind, first.fields) == ("sync", {"policy_version": 3, "pause_s": 0.5})
    assert second.fields == {"worker": "rollout/0"}
    assert 0 < first.time <= second.time


def test_metrics_of_one_step_are_merged_and_ordered(run: RunDir):
    run.append_metrics(2, {"reward/mean": 0.5, "lr": 1.0})
    run.append_metrics(1, {"reward/mean": 0.1})
    run.append_metrics(2, {"reward/mean": 0.7})
    assert run.read_metrics() == [
        {"step": 1, "reward/mean": 0.1},
        {"step": 2, "reward/mean": 0.7, "lr": 1.0},
    ]


def test_a_value_that_is_not_finite_becomes_a_gap(run: RunDir):
    run.append_metrics(1, {"a": float("nan"), "b": float("inf"), "c": 1})
    assert "NaN" not in run.metrics.read_text()
    assert run.read_metrics() == [{"step": 1, "c": 1.0}]


def test_samples_round_trip_with_an_abstained_verdict(run: RunDir):
    sample = Sample(
        step=4,
        group_id="g",
        task_id="t",
        prompt="1 + 1",
        completion="2\n</pre>",
        reward=None,
        reference="2",
        status="completed",
        policy_version=3,
        verdicts=[Verdict(score=None, name="math", error="timed out")],
    )
    run.append_sample(sample)
    assert run.read_samples() == [sample]


def test_a_torn_line_is_skipped_and_does_not_join_the_next(run: RunDir):
    run.append_metrics(1, {"lr": 1.0})
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 2, "lr"')
    assert [row["step"] for row in run.read_metrics()] == [1]
    run.append_metrics(3, {"lr": 3.0})
    assert [row["step"] for row in run.read_metrics()] == [1, 3]


def test_lines_of_a_killed_writer_are_whole(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    code = (
        "import sys; from pathlib import Path; from cluster.run_dir import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1])); n = 0\n"
        "while True: lines.append({'n': n, 'x': 'y' * 500}); n += 1\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        lines = JsonLines(path)
        deadline = threading.Event()
        while len(lines.read(dict[str, object])) < 50 and not deadline.wait(0.02):
            assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait(10)
    before = len(lines.read(dict[str, object]))
    lines.append({"n": -1})
    rows = lines.read(dict[str, object])
    assert [row["n"] for row in rows] == [*range(before), -1]


def test_following_a_file_gives_each_row_once(tmp_path: Path):
    lines = JsonLines(tmp_path / "lines.jsonl")
    assert lines.read_from(0, dict[str, int]) == ([], 0)
    lines.append({"n": 1})
    rows, offset = lines.read_from(0, dict[str, int])
    assert rows == [{"n": 1}]
    with lines.path.open("ab") as file:
        file.write(b'{"n": ')
    assert lines.read_from(offset, dict[str, int]) == ([], offset)
    with lines.path.open("ab") as file:
        file.write(b"2}\n")
    assert lines.read_from(offset, dict[str, int])[0] == [{"n": 2}]


def test_threads_append_whole_lines(tmp_path: Path):
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.append({"n": -1})

    def write(start: int) -> None:
        for n in range(start, start + 100):
            lines.append({"n": n})

    threads = [threading.Thread(target=write, args=(i * 100,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(row["n"] for row in lines.read(dict[str, int])) == list(range(-1, 400))


def test_log_lines_cannot_be_forged(run: RunDir, restored_root_logger, capsys):
    log.setup("rollout/0", run)
    log.set_progress(step=7)
    logger = logging.getLogger("hone.test")
    logger.info("only in the file")
    logger.warning("model wrote %s", "a\n2026-01-01T00:00:00.000Z ERROR fake\x1b[2J\u202e")
    try:
        raise ValueError("first\nsecond\x07")
    except ValueError:
        logger.exception("check failed")
    text = (run.logs / "rollout-0.log").read_text()
    starts = [line for line in text.splitlines() if not line.startswith("    ")]
    assert len(starts) == 3
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(rf"{stamp} INFO rollout/0 7 only in the file", starts[0])
    assert re.match(rf"{stamp} WARNING rollout/0 7 model wrote a\\n2026", starts[1])
    assert re.fullmatch(rf"{stamp} ERROR rollout/0 7 check failed", starts[2])
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    errors = capsys.readouterr().err
    assert "only in the file" not in errors
    assert "model wrote a\\n2026" in errors


def test_log_setup_twice_writes_each_record_once(run: RunDir, restored_root_logger):
    log.setup("launcher", run)
    log.setup("controller", run)
    logging.getLogger("hone.test").info("once")
    assert (run.logs / "launcher.log").read_text() == ""
    assert (run.logs / "controller.log").read_text().count("once") == 1


def test_records_are_json_objects_where_the_environment_says_so(
    run: RunDir, restored_root_logger: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HONE_LOG_FORMAT", "json")
    log.setup("rollout-3", run)
    log.set_progress(step=7, policy_version=6)
    logging.getLogger("somewhere").info("two\nlines")
    [line] = (run.logs / "rollout-3.log").read_text().splitlines()
    row = msgspec.json.decode(line)
    assert row.pop("time") > 1e9
    assert row == {
        "level": "INFO", "run": run.name, "actor": "rollout", "rank": 3, "step": 7,
        "policy_version": 6, "message": "two\\nlines",
    }  # fmt: skip
    for role, who in {
        "controller": ("controller", None), "verifier-a-b-77": ("verifier-a-b", 77),
        "learner/1": ("learner", 1),
    }.items():  # fmt: skip
        log.setup(role, run)
        logging.getLogger("somewhere").info("here")
        line = (run.logs / f"{role.replace('/', '-')}.log").read_text().splitlines()[-1]
        row = msgspec.json.decode(line)
        assert (row["actor"], row["rank"]) == who


def test_a_new_run_under_a_used_name_has_a_buffer_of_its_own(run: RunDir, tmp_path: Path):
    assert run.buffer_id == "demo"
    run.own_buffer()
    own = run.buffer_id
    assert own.startswith("demo-")
    run.own_buffer()
    assert RunDir(run.path).buffer_id == own, "a resumed run finds its groups again"
    other = RunDir.create(tmp_path / "others", "demo", "run: {}\n", exist_ok=False)
    other.own_buffer()
    assert other.buffer_id not in (own, "demo")


def test_a_run_that_has_begun_keeps_the_keys_that_it_has(run: RunDir):
    run.ledger.touch()
    run.own_buffer()
    assert run.buffer_id == "demo"
