"""What the studies make of finished runs: rows, verdicts and figures, from files as a run leaves
them, and which they take over; that the runs themselves do what is claimed is for the studies.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import (
    entropy_memory,
    entropy_study,
    guide_study,
    ppo_study,
    show_learner,
    staleness_study,
    study,
)
from benchmarks.entropy_memory import Cost
from benchmarks.show import Row, judged
from benchmarks.study import Run, mean_curve
from cluster.config import Config
from cluster.run_dir import RunDir
from cluster.types import Task

Metrics = Mapping[str, float]
QUICKSTART = ppo_study.CASES[0]


def _finish(folder: Path, name: str, rows: Sequence[Metrics], outcome: str = "done") -> None:
    """A run with one row of metrics per step, from step 0 on."""
    run = RunDir(folder / name)
    run.path.mkdir(parents=True)
    for step, row in enumerate(rows):
        run.append_metrics(step, row)
    run.append_event("run_finished", step=len(rows) - 1, outcome=outcome)


def _warm(place: Path, config: Path) -> None:
    """A finished warm start of seed 0."""
    place.mkdir(parents=True)
    study.stamp(place, config, ["run.seed=0"])


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sequence[Metrics]]:
    """What `hone train` leaves of the run of a name, instead of training; each is made once."""
    runs: dict[str, Sequence[Metrics]] = {}

    def hone(*arguments: str) -> None:
        *_, place, _, name = arguments
        _finish(Path(place.removeprefix("run.dir=")), name, runs.pop(name))

    monkeypatch.setattr(study, "hone", hone)
    return runs


def _verdicts(rows: Callable[[bool, Path], Iterable[Row]], folder: Path) -> list[str]:
    return [row.verdict for row in rows(True, folder)]


def _riddles(peak: float, pass_at_1: float, pass_at_k: float) -> list[Metrics]:
    evaluated = {"eval/pass@1": pass_at_1, "eval/pass@k": pass_at_k}
    step = {"siren/anchor": 1.2, "siren/peak_entropy": peak, "policy/entropy": 0.2}
    return [evaluated, *[step | {"reward/mean": 0.5}] * 99, step | evaluated | {"reward/mean": 0.5}]


@pytest.mark.parametrize(
    ("siren", "expected"),
    [
        ((1.1, 0.49, 0.9), ["holds", "holds", "holds"]),
        ((0.3, 0.49, 0.9), ["falls short", "holds", "holds"]),
        ((1.1, 0.49, 0.515), ["holds", "falls short", "holds"]),
        ((1.1, 0.4, 0.9), ["holds", "holds", "falls short"]),
    ],
)
def test_siren_must_keep_its_entropy_and_gain_by_it(
    tmp_path: Path,
    left: dict[str, Sequence[Metrics]],
    siren: tuple[float, float, float],
    expected: list[str],
):
    _warm(tmp_path / "policy-0", entropy_study.CONFIG)
    left |= {"GRPO-0": _riddles(0.2, 0.5, 0.5), "SIREN-0.05-0": _riddles(*siren)}
    assert _verdicts(entropy_study.rows, tmp_path) == expected
    assert ElementTree.parse(tmp_path / "entropy_study.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("grpo", "expected"),
    [
        (0.0, ["holds"] * 5),
        (0.06, ["holds"] * 4 + ["falls short"]),
    ],
)
def test_hints_count_only_where_plain_rollouts_learn_nothing(
    tmp_path: Path, left: dict[str, Sequence[Metrics]], grpo: float, expected: list[str]
):
    _warm(tmp_path / "code-0" / "warm", guide_study.CONFIG)
    hinted = {"guide/guided_fraction": 0.9}
    hinted_arms = {"Guide-GRPO": 0.6, "hinted-alone": 0.4, "misled": 0.55, "Guide-PPO": 0.5}
    for arm, last in hinted_arms.items():
        left[arm] = [{"eval/pass@1": 0.0}, hinted, hinted | {"eval/pass@1": last}]
    left["GRPO"] = [{"eval/pass@1": 0.0}, {}, {"eval/pass@1": grpo}]
    assert _verdicts(guide_study.rows, tmp_path) == expected
    assert ElementTree.parse(tmp_path / "guide_study.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("age", "naive", "expected"),
    [(8.0, 0.85, "holds"), (8.0, 0.9, "falls short"), (3.0, 0.85, "falls short")],
)
def test_young_groups_and_a_naive_run_that_is_as_good_show_nothing(
    tmp_path: Path, left: dict[str, Sequence[Metrics]], age: float, naive: float, expected: str
):
    _warm(tmp_path / "policy-0", staleness_study.CONFIG)
    for name in staleness_study.METHODS:
        own = 0.0 if name == "on-policy" else age
        step = {
            "policy_age/mean": own,
            "policy_age/max": own,
            "reward/mean": naive if name == "naive" else 0.9,
            "ratio/mismatch_kl": 0.1,
            "ratio/clip_fraction": 0.1,
        }
        evaluated = {"eval/pass@1": 0.9}
        left[f"{name}-0"] = [evaluated, *[step] * 59, step | evaluated]
    assert _verdicts(staleness_study.rows, tmp_path) == [expected]


def _accuracies(values: Mapping[int, float]) -> list[Metrics]:
    return [
        {"eval/pass@1": values[step]} if step in values else {} for step in range(max(values) + 1)
    ]


def _explained(value: float, until: int, num_steps: int) -> list[Metrics]:
    """`value` after pre-training until the step at which the mark is reached, 0 outside of it."""
    window = range(QUICKSTART.pretrain_steps + 1, until + 1)
    return [
        {"value/explained_variance": value if step in window else 0.0} for step in range(num_steps)
    ]


@pytest.mark.parametrize(
    ("grpo", "ppo", "explained", "expected"),
    [
        ({0: 0.4, 30: 0.7}, {0: 0.4, 30: 0.6, 50: 0.72, 60: 0.8}, (0.6, 50), ["holds", "holds"]),
        ({0: 0.4, 30: 0.7}, {0: 0.4, 30: 0.6, 60: 0.7}, (0.6, 60), ["holds", "holds"]),
        ({0: 0.4, 30: 0.7}, {0: 0.4, 30: 0.8, 60: 0.6}, (0.6, 60), ["falls short", "holds"]),
        ({0: 0.4, 30: 0.7}, {0: 0.4, 30: 0.6, 60: 0.69}, (0.3, 60), ["falls short", "falls short"]),
        ({0: 0.4, 30: 0.41}, {0: 0.41, 60: 0.5}, (0.6, 60), ["falls short", "falls short"]),
    ],
)
def test_ppo_must_reach_a_mark_that_had_to_be_learned(
    tmp_path: Path,
    left: dict[str, Sequence[Metrics]],
    grpo: Mapping[int, float],
    ppo: Mapping[int, float],
    explained: tuple[float, int],
    expected: list[str],
):
    _warm(tmp_path / "quickstart-0", QUICKSTART.config)
    left["quickstart-grpo-0"] = _accuracies(grpo)
    rows = zip(_accuracies(ppo), _explained(*explained, max(ppo) + 1), strict=True)
    left["quickstart-ppo-0"] = [{**accuracy, **more} for accuracy, more in rows]
    found = list(ppo_study.judge(QUICKSTART, [ppo_study.compare(QUICKSTART, tmp_path, 0)], ""))
    assert [row.verdict for row in found] == expected
    is_reached_at_once = ppo[0] >= grpo[30]
    assert found[1].measured.split()[0] == ("nan" if is_reached_at_once else f"{explained[0]:.2f}")


def test_a_run_that_was_interrupted_is_not_taken_over(tmp_path: Path):
    _finish(tmp_path, "whole", [{}])
    _finish(tmp_path, "broken", [{}], outcome="interrupted")
    assert study.is_done(RunDir(tmp_path / "whole"))
    assert not study.is_done(RunDir(tmp_path / "broken"))
    assert not study.is_done(RunDir(tmp_path / "absent"))


def test_a_finished_run_is_taken_over_only_when_made_from_the_same(
    tmp_path: Path, left: dict[str, Sequence[Metrics]]
):
    config, folder = tmp_path / "a.yaml", tmp_path / "study"
    config.write_text("seed: 0\n")
    num_trained = 0

    def is_trained(*changes: str) -> bool:
        """Whether a study trains the run, rather than taking what is there."""
        nonlocal num_trained
        left["run"] = [{"number": num_trained + 1}]
        number = study.train(config, folder, "run", changes).first("number")
        is_new = number == num_trained + 1
        num_trained += is_new
        return is_new

    _finish(folder, "run", [{"number": 0}])
    assert is_trained("a=1"), "nothing says what the run was made from"
    assert not is_trained("a=1")
    assert is_trained("a=2")
    config.write_text("seed: 1\n")
    assert is_trained("a=2")
    (folder / "run" / study.STAMP).unlink()
    assert is_trained("a=2")
    assert is_trained(f"policy={folder}/warm")
    folder = folder.rename(tmp_path / "moved")
    assert not is_trained(f"policy={folder}/warm"), "a study may be moved"


def test_a_warm_start_of_another_config_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, made = tmp_path / "a.yaml", list[int]()

    def warm_up(config: Config, place: Path, tasks: list[Task]) -> None:
        place.mkdir()
        made.append(config.run.seed)

    monkeypatch.setattr(study, "_warm_up", warm_up)
    text = QUICKSTART.config.read_text()
    (tmp_path / "policy").mkdir()  # nothing says what it was made from
    for more, seed, num_made in (("", 0, 1), ("", 0, 1), ("", 1, 2), ("\n", 1, 3)):
        config.write_text(text + more)
        changes = study.warm_started(config, tmp_path / "policy", seed, lambda config: [])
        assert changes[0] == f"run.seed={seed}"
        assert len(made) == num_made
    assert made == [0, 1, 1]


def test_a_mean_curve_has_the_steps_that_all_runs_have():
    runs = [Run([{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]), Run([{"step": 2, "x": 4.0}])]
    assert mean_curve(runs, "x") == [(2, 3.0)]
    assert mean_curve(runs, "y") == []


def test_a_peak_that_was_forgotten_hides_no_later_one():
    held = b"1" * 2**26
    del held
    entropy_memory._forget_peak()
    before = entropy_memory._peak_kib()
    held = b"1" * 2**25
    assert entropy_memory._peak_kib() - before >= 0.9 * len(held) / 1024


def test_a_figure_outlives_the_runs_that_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(show_learner, "FIGURES", tmp_path / "runs" / "figures")
    (tmp_path / "study.svg").write_text("<svg/>")
    [row] = show_learner.drawn([judged("a", "1", "1", True)], tmp_path / "study.svg")
    assert row.claim == "a"
    assert (tmp_path / "runs" / "figures" / "study.svg").read_text() == "<svg/>"


@pytest.mark.parametrize(
    ("siren", "verdicts"),
    [
        (Cost(100, 1.9, 5.0), ["holds", "holds", "holds"]),
        (Cost(130, 1.9, 5.0), ["falls short", "holds", "holds"]),
        (Cost(100, 2.1, 5.0), ["holds", "falls short", "holds"]),
    ],
)
def test_costs_beyond_a_bound_fall_short(
    siren: Cost,
    verdicts: list[str],
    capsys: pytest.CaptureFixture[str],
):
    costs = {"logprobs": Cost(80, 1.0, 5.0), "siren": siren, "dense": Cost(1000, 0.8, 5.0)}
    assert [row.verdict for row in entropy_memory.judge(costs, "8 tokens")] == verdicts
    assert entropy_memory.report(costs, "8 tokens") == int("falls short" in verdicts)
    assert "(bound: at most 1/8)" in capsys.readouterr().out
