"""Demonstrations end, whatever a row or a process that it waits for does."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import chaos, judge_outage, live_swaps, proofs, replay_buffer, show
from benchmarks.show import Part, Row, judged
from cluster import config_file
from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.run_dir import Event, RunDir

BROKEN = """
from benchmarks.show import Part, judged

def rows(quick):
    yield judged("first", "1", "1", True)
    yield Part("second", lambda: [judged("a [b", "1", "1", 1 / 0 == 0)])
    yield Part("third", lambda: [judged("third", "[/] 1", "1", True)])
    raise OSError("[Errno 28] disk is full")
"""


def test_a_row_that_raises_falls_short_and_the_others_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    area = tmp_path / "show_broken.py"
    area.write_text(BROKEN)
    monkeypatch.setattr(show, "__file__", str(tmp_path / "show.py"))
    monkeypatch.setattr(show, "AREAS", ("broken",))
    import benchmarks

    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    assert show.main(["broken"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    for words in ("first: 1 · holds", "ZeroDivisionError", "third: [/] 1 · holds", "[Errno 28]"):
        assert words in output
    assert "claim" in output, "the table is printed"


def test_the_command_measures_the_parts_of_an_area(tmp_path: Path):
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "show.py").write_text(Path(show.__file__).read_text())
    (package / "show_serve.py").write_text(
        "from benchmarks.show import Part, judged\n\n"
        "def rows(quick):\n"
        "    yield Part('whole', lambda: [judged('inner', '1', '1', True)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.show", "serve"], cwd=tmp_path, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "inner: 1 · holds" in done.stdout


def test_rows_made_before_an_error_stay():
    def two() -> Iterator[Row]:
        yield judged("one", "1", "1", True)
        raise RuntimeError("no more")

    rows = list(show.measured(Part("both", two)))
    assert [row.verdict for row in rows] == ["holds", "falls short"]
    assert rows[1].why == "RuntimeError: no more"


def test_a_command_that_hangs_silently_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(proofs, "END_S", 0.5)
    script = "import signal, subprocess, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    script += "subprocess.Popen(['sleep', '60'])\ntime.sleep(60)"
    started = time.monotonic()
    run = proofs.run_timed([sys.executable, "-c", script], tmp_path, 1.0)
    assert run.code != 0
    assert run.output == ""
    assert time.monotonic() - started < 10


def test_tests_that_do_not_end_do_not_hold_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(proofs, "END_S", 2.0)
    path = tmp_path / "test_forever.py"
    path.write_text("import time\n\ndef test_forever():\n    time.sleep(60)\n")
    started = time.monotonic()
    tested = proofs.run_tests([str(path)], timeout_s=1.0)
    assert (tested.is_green, tested.why) == (False, "ended after 1 s")
    assert time.monotonic() - started < 30


SHARED = """
import time
import pytest

@pytest.fixture(scope="module")
def calm():
    with open("{place}", "a") as file:
        file.write("made ")

def test_figure(calm, record_property):
    record_property("tensors", 3)

def test_skips(calm):
    pytest.skip("no libfaketime here")

def test_fails(calm):
    assert False, "a bit differs"

def test_late(calm):
    time.sleep(60)
"""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "test_shared.py"
    path.write_text(SHARED.format(place=tmp_path / "made"))
    return path


def test_claims_that_share_a_run_have_a_row_each(shared: Path):
    nodes = {name: f"{shared}::test_{name}" for name in ("figure", "skips", "fails")}
    claims = [
        proofs.Claim("a", [nodes["figure"]], "at most 3", {"tensors": 3.0}),
        proofs.Claim("b", [nodes["skips"]], "none", {"tensors": 0.0}),
        proofs.Claim("c", [nodes["figure"], nodes["fails"]], "at most 2", {"tensors": 2.0}),
        proofs.Claim("d", [nodes["figure"]], "at most 2", {"tensors": 2.0}),
    ]
    rows = list(proofs.proven_together(claims))
    assert [row.verdict for row in rows] == [
        "holds", "not shown here", "falls short", "falls short"
    ]  # fmt: skip
    assert (rows[0].measured, rows[0].why) == ("1 tests passed, 0 not; tensors 3", "")
    assert rows[1].measured == "0 tests passed, 0 not, 1 skipped; tensors nan"
    assert "no libfaketime here" in rows[1].why
    assert "a bit differs" in rows[2].why
    assert (shared.parent / "made").read_text() == "made ", "once for all"


def test_of_tests_in_one_run_those_that_came_to_their_end_count(
    monkeypatch: pytest.MonkeyPatch, shared: Path
):
    monkeypatch.setattr(proofs, "END_S", 2.0)
    monkeypatch.setattr(proofs, "TESTS_S", 3.0)
    nodes = [f"{shared}::test_{name}" for name in ("figure", "late")]
    rows = list(proofs.proven_together([proofs.Claim("", [node], "") for node in nodes]))
    assert [(row.verdict, row.why) for row in rows] == [
        ("holds", ""), ("falls short", "ended after 6 s")
    ]  # fmt: skip


@pytest.mark.parametrize("statement", ["pytest.skip('no GPU', allow_module_level=True)", ""])
def test_what_is_skipped_is_not_shown_and_says_why(tmp_path: Path, statement: str):
    path = tmp_path / "test_skipped.py"
    body = "def test_one():\n    pytest.skip('no GPU')\n"
    path.write_text(f"import pytest\n{statement}\n{body}\ndef test_two():\n    pass\n")
    row = proofs.proven("claim", [str(path)], "all pass")
    assert row.verdict == "not shown here"
    assert "no GPU" in row.why


def test_a_timed_command_has_its_code_and_output(tmp_path: Path):
    run = proofs.run_timed(["sh", "-c", "echo one; sleep 0.3; echo two; exit 3"], tmp_path, 10.0)
    assert (run.code, run.output) == (3, "one\ntwo\n")
    assert run.first_s < run.total_s - 0.2


def test_the_wait_of_a_cut_over_is_that_of_the_step_under_way():
    waits = [5.0, 5.0, 5.0, 1.0, 1.0, 3.5, 1.0]
    rows = [{"step": i + 1.0, "time/wait_s/learn": wait} for i, wait in enumerate(waits)]
    arrivals = [10.0 * i for i in range(len(waits))]
    swap = Event(time=44.0, kind="reward_swapped", fields={})
    assert live_swaps._extra_waits_s(rows, arrivals, [swap]) == [2.5]
    late = Event(time=99.0, kind="reward_swapped", fields={})
    assert live_swaps._extra_waits_s(rows, arrivals, [late]) == []
    assert live_swaps._extra_waits_s([], [], [swap]) == []


def test_a_group_with_verdicts_twice_is_counted(tmp_path: Path):
    book = GroupLog(RunDir(tmp_path))
    for group_id in ("a", "b", "a"):
        book.append(GroupLine(group_id=group_id, fate=Fate.SAMPLED, rewards=[1.0, 0.0]))
    book.dropped("b", "too_old")
    assert live_swaps.scored(RunDir(tmp_path)) == {"a": 2, "b": 1}


def test_the_run_of_the_live_swaps_is_a_valid_one():
    path = proofs.ROOT / "deploy/configs/quickstart.yaml"
    config = config_file.load(path, live_swaps.SMALL)
    verifier = config.rewards.verifiers["correct"]
    assert verifier.use == "benchmarks.swap_rewards:Bonus"
    assert verifier.settings == {"bonus": 0}


def test_the_run_of_the_judge_outage_is_a_valid_one():
    path = proofs.ROOT / "deploy/configs/quickstart.yaml"
    config = config_file.load(path, [*judge_outage.SMALL, judge_outage.judged_by(4711)])
    verifiers = config.rewards.verifiers
    assert list(verifiers) == ["correct", "judged"]
    assert (verifiers["correct"].weight, verifiers["judged"].weight) == (0, 1)
    settings = verifiers["judged"].settings
    assert settings["base_url"] == "http://127.0.0.1:4711/v1"
    assert settings["first"] == {"use": verifiers["correct"].use}


def test_a_learner_that_falls_behind_the_producers_is_seen(monkeypatch: pytest.MonkeyPatch):
    call = replay_buffer.Latency(p50_s=0.01, p99_s=0.02, groups_per_s=4000.0, mb_per_s=230.0)

    def measure(num_groups: int, _num_tokens: int) -> replay_buffer.Measurement:
        return replay_buffer.Measurement(
            num_groups=num_groups, group_bytes=57_000, add=call, claim_fetch=call, num_claims=9,
            consume_acknowledge=call, learned_per_s=1500.0, producer_cpus=1.0, redis_cpus=0.5,
        )  # fmt: skip

    monkeypatch.setattr(replay_buffer, "measure", measure)
    rows = list(replay_buffer.rows(quick=False))
    assert [row.verdict for row in rows] == ["holds", "holds"], "the bound is of adding"
    assert all("4,000 groups/s added, 1,500 groups/s learned" in row.measured for row in rows)


def test_a_run_that_does_not_end_is_a_timeout_that_a_row_can_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    run = chaos.LiveRun(tmp_path, "late", [])
    run.output.write_text("step 3 of 200")
    sleeper = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(run, "_process", sleeper)
    try:
        with pytest.raises(TimeoutError, match=r"no end in 0\.1 s: step 3 of 200"):
            run.finish(0.1)
    finally:
        sleeper.kill()
        sleeper.wait()
