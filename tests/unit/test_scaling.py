"""`hone plan`: which splits it tries, which it recommends, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import msgspec
import pytest

from cluster.errors import ConfigError
from cluster.simulation import Forecast, Layout
from cluster.stage_profile import StageProfile
from serve import cli, scaling

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "deploy" / "profiles" / "quickstart_two_cores.json"


@pytest.fixture(scope="module")
def profile() -> StageProfile:
    return StageProfile.read(PROFILE)


def hone_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["hone", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def forecast(workers: int, age: int, groups_per_s: float) -> Forecast:
    layout = Layout(workers=workers, world_size=4, max_policy_age=age, groups_per_step=400)
    return Forecast(
        layout=layout, step_s=400 / groups_per_s, groups_per_s=groups_per_s, age_mean=age,
        age_max=age, rollout_idle=0.0, learner_idle=0.0, num_drawn=0, num_used=0, num_dropped=0,
        num_under_way=0,
    )  # fmt: skip


def test_every_split_uses_the_gpus_and_fits_whole_engines(profile: StageProfile) -> None:
    paired = msgspec.structs.replace(profile, gpus_per_worker=2)
    for num_gpus in (3, 8, 64, 10_000):
        found = scaling.layouts(paired, num_gpus, [0, 2], 16)
        assert {layout.max_policy_age for layout in found} == {0, 2}
        for layout in found:
            assert min(layout.workers, layout.world_size) >= 1
            assert num_gpus - 1 <= 2 * layout.workers + layout.world_size <= num_gpus
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel_size"):
        scaling.layouts(paired, 2, [0], 16)


def test_the_fastest_split_is_best_unless_a_younger_one_is_nearly_as_fast() -> None:
    on_policy, ahead, fast = forecast(3, 0, 50.0), forecast(4, 1, 98.0), forecast(5, 3, 100.0)
    assert scaling.best([on_policy, ahead, fast]) is ahead
    assert scaling.best([on_policy, fast]) is fast


def test_a_step_that_outgrows_the_buffer_says_so() -> None:
    assert scaling.overrides(forecast(5, 3, 1.0).layout) == [
        "rollout.workers=5",
        "learner.world_size=4",
        "rollout.max_policy_age=3",
        "rollout.groups_per_step=400",
        "buffer.capacity_groups=2000",
    ]


def test_a_plan_is_printed_with_its_source_and_the_knobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = hone_plan(monkeypatch, capsys, "--profile", str(PROFILE), "--age", "1")
    assert code == 0
    assert "simulated" in out
    assert "stage times: the quickstart in sync mode on two CPU cores" in out
    assert "recommended: rollout.workers=" in out


def test_the_example_of_the_docs_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    [command] = re.findall(r"^hone plan (--profile deploy/.*)$", page, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    code, out, _ = hone_plan(monkeypatch, capsys, *command.split())
    assert code == 0
    printed = [re.findall(r"[\d.,]+%?|best", line) for line in out.splitlines()]
    rows = [re.findall(r"[\d.,]+%?", line) for line in re.findall(r"^.*\d% \|$", page, re.M)]
    assert len(rows) == 9
    for [workers, ranks, age, *measured] in rows:
        [found] = [p for p in printed if p[:3] == [workers, ranks, age]]
        assert [cell for cell in found[4:] if cell != "best"] == measured
    assert out.splitlines()[-1] in page


def test_options_change_what_is_simulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def step_s(*options: str) -> float:
        given = ["--profile", str(PROFILE), "--gpus", "2", "--json", *options]
        code, out, _ = hone_plan(monkeypatch, capsys, *given)
        assert code == 0
        return json.loads(out)["best"]["step_s"]

    copy = tmp_path / "profile.json"
    plain = step_s("--write", str(copy))
    assert StageProfile.read(copy) == StageProfile.read(PROFILE)
    assert step_s("--model-scale", "10") > 5 * plain
    assert step_s("--lengths", "128,1.0,1024") > 1.5 * plain
    assert step_s("--groups-per-step", "64") > 1.5 * plain


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--lengths", "64"], "--lengths must be MEAN,SIGMA,CAP"),
        (["--lengths", "0,1,10"], "--lengths must be MEAN,SIGMA,CAP"),
        (["--model-scale", "0"], "--model-scale must be above 0"),
        (["--learner-efficiency", "0.5"], "learner_efficiency must be above 0.5"),
        (["some-run"], "give a run or --profile"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    reason: str,
) -> None:
    code, _, err = hone_plan(monkeypatch, capsys, "--profile", str(PROFILE), *options)
    assert code == 2
    assert reason in err
