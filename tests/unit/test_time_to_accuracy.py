"""Time to the same accuracy: the shared rule, the clocks, the mark, and what a folder keeps."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import pytest

from benchmarks import study, time_to_accuracy, trl_environment, trl_peer
from benchmarks.synced_steps import num_beside_standby
from benchmarks.time_to_accuracy import Comparison, Point, curve_of
from benchmarks.trl_environment import PeerRun, SavedWeights
from cluster import config_file
from cluster.errors import StageError
from cluster.run_dir import RunDir
from rewards.answers import final_part, last_line
from tests.sum_cases import COMPLETIONS


@pytest.mark.parametrize("answer", ["12", "-4", "0"])
def test_the_rule_reads_the_line_that_hone_extracts(answer: str) -> None:
    for template, score in COMPLETIONS:
        text = template.replace("{answer}", answer)
        assert trl_peer.last_line_is_right("", text, answer) == score, text
        extracted = last_line(final_part(text))
        assert trl_peer.last_line_is_right("", extracted, answer) == score, text


def test_the_config_shares_the_rule_and_compares_128_samples() -> None:
    config = config_file.load(time_to_accuracy.CONFIG)
    [verifier] = config.rewards.verifiers.values()
    assert verifier.use == f"benchmarks.trl_peer:{trl_peer.last_line_is_right.__name__}"
    assert config.rollout.groups_per_step * config.rollout.group_size == 128
    assert config.rollout.max_policy_age > 0, "Hone is measured as it runs by default"
    assert config.run.steps % config.eval.every == 0, "both are evaluated at their end"
    assert (config.learner.schedule, config.learner.warmup_steps) == ("constant", 0), "TRL's"
    assert config.policy.dtype == "float32"


def metrics(step_s: dict[int, float], accuracy: dict[int, float]) -> list[dict[str, float]]:
    """Rows as a run writes them, from step 0 on."""
    return [
        {"step": float(step)}
        | ({"time/step_s": step_s[step]} if step in step_s else {})
        | ({"eval/pass@1": accuracy[step]} if step in accuracy else {})
        for step in range(max(step_s) + 1)
    ]


def test_steps_that_an_evaluation_helped_count_as_the_others() -> None:
    step_s = {1: 9.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 2.0, 6: 0.1, 7: 0.1, 8: 5.0, 9: 4.0, 10: 6.0}
    rows = metrics(step_s, {0: 0.2, 5: 0.3, 10: 0.5})
    curve = curve_of(rows, num_ahead=2)
    assert [(point.step, point.accuracy) for point in curve] == [(0, 0.2), (5, 0.3), (10, 0.5)]
    assert [point.seconds for point in curve] == pytest.approx([0.0, 20.0, 20.0 + 5 * 5.0])


def test_an_interval_without_a_step_to_count_is_no_clock() -> None:
    rows = metrics(dict.fromkeys(range(1, 5), 1.0), {0: 0.2, 2: 0.3, 4: 0.5})
    with pytest.raises(ValueError, match=r"eval\.every must be above 2"):
        curve_of(rows, num_ahead=2)


def test_steps_beside_which_a_worker_is_prepared_count_as_later_ones() -> None:
    step_s = {1: 9.0, 2: 8.0, 3: 3.0, 4: 5.0, 5: 4.0, 6: 0.1, 7: 0.1, 8: 5.0, 9: 5.0, 10: 5.0}
    rows = metrics(step_s, {0: 0.2, 5: 0.3, 10: 0.5})

    def seconds(num_beside: int) -> list[float]:
        return [point.seconds for point in curve_of(rows, 2, num_beside)]

    assert seconds(0) == pytest.approx([0.0, 29.0, 54.0])
    assert seconds(2) == pytest.approx([0.0, 20.0, 45.0])
    assert seconds(9) == pytest.approx([0.0, 25.0, 50.0]), "no later one in the first interval"
    with pytest.raises(ValueError, match="until step 10"):
        seconds(10)


def test_a_run_says_how_many_steps_began_before_its_worker_stood_by(tmp_path: Path) -> None:
    assert num_beside_standby(prepared(tmp_path / "none", None)) == 0
    assert num_beside_standby(prepared(tmp_path / "early", 5.0)) == 0, "before the first sync"
    assert num_beside_standby(prepared(tmp_path / "third", 25.0)) == 2, "step 3 began afterwards"
    assert num_beside_standby(prepared(tmp_path / "late", 99.0)) == 3


def prepared(place: Path, ready_at: float | None) -> RunDir:
    """A run whose engines held version n after 10 (n + 1) seconds."""
    place.mkdir()
    run = RunDir(place)
    events: list[dict[str, object]] = [
        {"time": 10.0 * (version + 1), "kind": "sync", "policy_version": version}
        for version in range(4)
    ]
    if ready_at is not None:
        events.append({"time": ready_at, "kind": "standby_ready"})
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


START = Point(0, 0.0, 0.2)


def test_the_mark_is_nine_tenths_of_the_gain_of_the_one_that_learns_less() -> None:
    ours = [START, Point(5, 20.0, 0.35), Point(10, 40.0, 0.6), Point(15, 60.0, 0.55)]
    theirs = [START, Point(5, 100.0, 0.3), Point(10, 200.0, 0.5), Point(15, 300.0, 0.45)]
    found = Comparison(ours, theirs)
    assert found.mark == pytest.approx(0.47)
    assert found.ratio == pytest.approx(29.6 / 185.0)
    assert found.has_learnt
    assert "Hone 30 s (7.4 steps of 4.00 s), TRL 185 s (9.2 steps of 20.00 s)" in str(found)
    assert Comparison(theirs, ours).ratio == pytest.approx(6.25), "whoever is the better one"


def test_a_mark_near_the_start_proves_nothing() -> None:
    found = Comparison([START, Point(5, 20.0, 0.6)], [START, Point(5, 100.0, 0.29)])
    assert not found.has_learnt
    flat = Comparison([START, Point(5, 20.0, 0.6)], [START, Point(5, 100.0, 0.1)])
    assert not flat.has_learnt
    assert flat.ratio != flat.ratio, "no seconds to divide by"


def finished(folder: Path, hone_step_s: float, trl_accuracy: float) -> None:
    """What a study of one seed leaves: steps of TRL take 20 s, Hone learns from 0.2 to 0.6."""
    (folder / "policy-0").mkdir()
    config = time_to_accuracy.CONFIG
    study.stamp(folder / "policy-0", config, ["run.seed=0"])
    start = study.warm_started(config, folder / "policy-0", 0, study.training_tasks)
    run = RunDir(folder / "hone-0")
    run.path.mkdir()
    step_s = dict.fromkeys(range(1, 11), hone_step_s)
    for row in metrics(step_s, {0: 0.2, 5: 0.4, 10: 0.6}):
        run.append_metrics(int(row.pop("step")), row)
    run.append_event("run_finished", step=10, outcome="done")
    study.stamp(run.path, config, start)
    saved = [SavedWeights(5, 100.0), SavedWeights(10, 200.0)]
    for name, micro_batch in {"trl-0-tried-128": 128, "trl-0-tried-32": 32, "trl-0": 32}.items():
        peer = PeerRun(
            version="1", transformers="1", torch="1", threads=2, dtype="torch.float32",
            num_parameters=3_000_000, micro_batch=micro_batch, median_step_s=20.0 + micro_batch,
            step_s=[20.0], tokens=[1.0], saved=saved,
        )  # fmt: skip
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(peer))
    (folder / "trl-0").mkdir()
    for step, accuracy in {5: 0.3, 10: trl_accuracy}.items():
        result = {"pass@1": {"value": accuracy}}
        (folder / "trl-0" / f"step-{step}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("hone_step_s", "trl_accuracy", "verdict"),
    [(4.0, 0.55, "holds"), (10.0, 0.55, "falls short"), (4.0, 0.29, "falls short")],
)
def test_a_finished_folder_is_judged_without_another_run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    hone_step_s: float,
    trl_accuracy: float,
    verdict: str,
) -> None:
    monkeypatch.setattr(trl_environment, "environment", Path)
    finished(tmp_path, hone_step_s, trl_accuracy)
    [row] = time_to_accuracy.rows(True, tmp_path)
    assert row.verdict == verdict, row
    assert "micro-batches of 32" in row.measured
    assert ("above the start" in row.why) == (trl_accuracy < 0.3)


def test_weights_of_the_peer_are_evaluated_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, ...]] = []

    def hone(*arguments: str) -> str:
        asked.append(arguments)
        result = {"pass@1": {"value": 0.5, "half_width_95": 0.1}, "k": 4}
        return f"a warning\n{json.dumps(result, indent=1)}\nand another\n"

    monkeypatch.setattr(trl_environment, "environment", Path)
    monkeypatch.setattr(time_to_accuracy, "hone", hone)
    finished(tmp_path, 4.0, 0.5)
    (tmp_path / "trl-0" / "step-10.json").unlink()
    for _ in range(2):
        [row] = time_to_accuracy.rows(True, tmp_path)
        assert row.verdict == "holds"
    [(command, weights, config, *_changes, as_json)] = asked
    assert (command, as_json) == ("eval", "--json")
    assert (Path(weights), Path(config)) == (
        tmp_path / "trl-0" / "step-10",
        time_to_accuracy.CONFIG,
    )


def test_without_the_peer_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> Path:
        raise StageError("trl", "its environment cannot be made: no network")

    monkeypatch.setattr(trl_environment, "environment", fail)
    [row] = time_to_accuracy.rows(True, tmp_path)
    assert row.verdict == "not shown here"
    assert "no network" in row.why


def test_saving_needs_a_place() -> None:
    with pytest.raises(SystemExit):
        trl_peer.parsed(["--policy", "p", "--tasks", "t", "--save-every", "5"])


class Weights:
    """Of the trainer below; to save them takes a while."""

    def save_pretrained(self, place: Path) -> None:
        place.mkdir(parents=True)
        (place / "model.safetensors").write_text("trained")
        (place / "config.json").write_text("changed")
        time.sleep(0.3)

    def parameters(self) -> Iterator[Any]:
        yield SimpleNamespace(dtype="torch.float32")

    def num_parameters(self) -> int:
        return 3


class Trainer:
    """As many steps as TRL's would take, each without work."""

    def __init__(self, args: SimpleNamespace, callbacks: list[Any], **_more: Any) -> None:
        self.model = Weights()
        self.state = SimpleNamespace(log_history=[{"completions/mean_length": 2.0}] * 5)
        self._num_steps, [self._clock] = args.max_steps, callbacks

    def train(self) -> None:
        self._clock.on_train_begin(None, None, None)
        for _ in range(self._num_steps):
            self._clock.on_step_end(None, None, None, model=self.model)


def test_the_peer_saves_off_its_clock_and_with_the_tokenizer_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fakes: dict[str, Any] = {
        "torch": {"float32": None, "__version__": "1", "get_num_threads": lambda: 2},
        "transformers": {
            "TrainerCallback": object, "__version__": "1",
            "AutoModelForCausalLM": mock.Mock(), "AutoTokenizer": mock.Mock(),
        },
        "trl": {"GRPOConfig": SimpleNamespace, "GRPOTrainer": Trainer, "__version__": "1"},
        "datasets": {"Dataset": mock.Mock()},
    }  # fmt: skip
    for name, members in fakes.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    start = tmp_path / "start"
    start.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (start / name).write_text("start")
    (tmp_path / "tasks").write_text("")
    words = [
        f"--policy={start}", f"--tasks={tmp_path / 'tasks'}", "--steps=4", "--save-every=2",
        f"--save-in={tmp_path}", "--reward=last_line_is_right",
    ]  # fmt: skip
    result = trl_peer.train(trl_peer.parsed(words))
    assert [saved["step"] for saved in result["saved"]] == [2, 4]
    assert all(saved["seconds"] < 0.3 for saved in result["saved"])
    assert len(result["step_s"]) == 4
    assert sum(result["step_s"]) < 0.3
    for step, name, text in [
        (2, "model.safetensors", "trained"),
        (4, "model.safetensors", "trained"),
        (4, "tokenizer.json", "start"),
        (4, "config.json", "start"),
    ]:
        assert (tmp_path / f"step-{step}" / name).read_text() == text
