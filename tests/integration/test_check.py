"""`hone check` on real tasks, tokenizers and rewards: what it accepts, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import config_file
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.resume import refuse_changes
from cluster.run_dir import RunDir
from serve import check


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20, 60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def config_file_path(tmp_path: Path, tasks_file: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
policy: {{type: tiny, hidden_size: 64, num_layers: 2, num_heads: 2, context_length: 64}}
tasks: {{train: {{use: file, settings: {{path: {tasks_file}}}}}}}
rollout: {{group_size: 4, groups_per_step: 4, max_new_tokens: 16}}
rewards: {{verifiers: {{correct: {{use: math}}}}}}
resources: {{accelerator: cpu}}
"""
    )
    return path


def examine(path: Path, *overrides: str, address: str = "local") -> check.CheckReport:
    config: Config = config_file.load(path, list(overrides))
    return check.build(config, address=address, announce=lambda line: None)


def test_a_sound_config_has_a_plan_and_leaves_nothing(
    config_file_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    report = examine(config_file_path)
    assert report.problems == []
    plan = dict(report.plan)
    assert "36 train, 4 eval" in plan["tasks"]
    assert "4 groups x 4 = 16 trajectories" in plan["batch"]
    assert "8 groups in flight" in plan["capacity"]
    assert plan["placement"] == (
        "learner 1 x 1 CPU (pack); rollout 1 x 1 CPU (spread); reward 1 x a place (spread)"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_every_problem_is_found_in_one_pass(config_file_path: Path):
    report = examine(
        config_file_path,
        "rollout.program.use=single_trun",
        "objective.credit.use=grop",
        "objective.losses={p: {use: policy_gradient, settings: {clip: 1}}}",
        "critic={loss: {use: valeu}}",
        "run.trackers=[mlflow]",
        "buffer.url=redis://:secret@127.0.0.1:1/0",
        "rewards.verifiers.correct.use=mth",
        "policy.context_length=20",
    )
    starts = [
        "rollout.program: ",
        "objective.credit: ",
        "objective.losses.p.settings.clip: ",
        "critic.loss: ",
        "run.trackers: ",
        "buffer.url ",
        "policy.context_length: ",
        "rewards.verifiers.correct",
    ]
    assert len(report.problems) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in report.problems), start
    assert "secret" not in "".join(report.problems)
    assert report.plan == []


def test_rewards_that_refuse_the_gold_answer_are_a_problem(config_file_path: Path):
    report = examine(
        config_file_path,
        "rewards.verifiers.correct.use=format",
        "rewards.verifiers.correct.settings={pattern: 'never written'}",
    )
    [problem] = report.problems
    assert "the gold answer" in problem
    assert f"one of {check.GOLD_TASKS} such tasks" in problem


def test_rewards_that_pay_for_junk_are_a_warning(config_file_path: Path):
    report = examine(
        config_file_path,
        "rewards.verifiers.correct.use=format",
        "rewards.verifiers.correct.settings={pattern: '.*'}",
    )
    assert report.problems == []
    assert any("earns the full reward on 100%" in warning for warning in report.warnings)


def test_hints_must_have_something_to_come_from(config_file_path: Path, tmp_path: Path):
    guide = "objective.losses.policy.use=guide"
    [problem] = examine(config_file_path, "rollout.program.use=guide", guide).problems
    assert problem.startswith("rollout.program.settings.hints: needs tasks with hints")
    assert "none of the 36 in tasks.train" in problem
    answer = "rollout.program={use: guide, settings: {hints: {use: answer}}}"
    assert examine(config_file_path, answer, guide).problems == []


@pytest.mark.parametrize("kept", ["strip: false", "place: completion"])
def test_a_stripped_hint_needs_a_loss_that_knows_of_it(config_file_path: Path, kept: str):
    program = "rollout.program={{use: guide, settings: {{hints: {{use: answer}}, {}}}}}"
    losses = "objective.losses={policy: {use: gspo}, bonus: {use: entropy_bonus}}"
    [problem] = examine(config_file_path, program.format("merge: replace"), losses).problems
    assert problem.startswith("objective.losses.policy: gspo would take the hint")
    assert "use guide" in problem
    assert examine(config_file_path, program.format(kept), losses).problems == []


def test_whitened_advantages_of_hinted_groups_are_a_warning(config_file_path: Path):
    guided = (
        "rollout.program={use: guide, settings: {hints: {use: answer}}}",
        "objective.losses={policy: {use: guide}}",
        "critic={lr: 1.0e-5}",
    )
    for whitening in ("true", "false"):
        credit = f"objective.credit={{use: gae, settings: {{whitening: {whitening}}}}}"
        report = examine(config_file_path, *guided, credit)
        assert report.problems == []
        found = [line for line in report.warnings if line.startswith("objective.credit")]
        assert bool(found) == (whitening == "true")


def test_a_loss_that_averages_credit_per_token_is_refused(config_file_path: Path):
    ppo = ("objective.credit.use=gae", "critic={lr: 1.0e-5}", "tasks.skip_uniform=false")
    [problem] = examine(config_file_path, *ppo, "objective.losses={p: {use: gmpo}}").problems
    assert problem.startswith("objective.losses.p: gmpo has one advantage per sequence")


def test_a_loss_without_a_second_update_is_a_warning(config_file_path: Path):
    losses = "objective.losses={policy: {use: policy_gradient}, cov: {use: kl_cov}}"
    for epochs in (1, 2):
        report = examine(config_file_path, losses, f"learner.epochs={epochs}")
        assert report.problems == []
        assert any("kl_cov is 0" in line for line in report.warnings) == (epochs == 1)


def test_a_critic_that_sees_no_uniform_groups_is_a_warning(config_file_path: Path):
    warning = "tasks.skip_uniform: a critic must also see groups that agree: set it to false"
    ppo = ("objective.credit.use=gae", "critic={lr: 1.0e-5}")
    report = examine(config_file_path, *ppo)
    assert report.problems == []
    assert warning in report.warnings
    assert warning not in examine(config_file_path, *ppo, "tasks.skip_uniform=false").warnings
    assert warning not in examine(config_file_path).warnings


def test_what_a_cpu_cannot_do_is_said_before_the_start(config_file_path: Path):
    [problem] = examine(config_file_path, "rollout.tensor_parallel_size=2").problems
    assert problem == "rollout.tensor_parallel_size must be 1 without GPUs, got 2"
    with pytest.raises(ConfigError, match=r"policy: 3 versions of its weights need .* /dev/shm"):
        check._check_memory(config_file.load(config_file_path), 10**13)


def test_engines_cannot_give_memory_back_without_gpus(config_file_path: Path):
    turns = ["resources.layout=alternating", "resources.engine_gpu_share=0.4"]
    [problem] = examine(config_file_path, *turns, "rollout.max_policy_age=0").problems
    assert problem.startswith("resources.layout alternating needs GPUs")


def test_a_plug_in_beside_the_config_is_found(config_file_path: Path, tmp_path: Path):
    (tmp_path / "beside.py").write_text(
        "from rewards.base import VerifierIO\n\n\n"
        "class Brief:\n"
        "    async def score(self, group, io: VerifierIO):\n"
        "        from cluster.types import Verdict\n\n"
        "        return [Verdict(score=float(len(t.text) < 9)) for t in group.trajectories]\n"
    )
    hone = Path(sys.executable).parent / "hone"
    done = subprocess.run(
        [hone, "check", config_file_path, "rewards.verifiers.brief={use: 'beside:Brief'}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_resumed_run_keeps_what_shapes_learning(config_file_path: Path, tmp_path: Path):
    before = config_file.load(config_file_path)
    run = RunDir.create(tmp_path, "demo", config_file.dump(before), exist_ok=False)
    changed = config_file.load(
        config_file_path, ["learner.lr=0.5", "run.steps=7", "warm_start.steps=3"]
    )
    refuse_changes(changed, run)  # nothing made yet
    run.policy.mkdir(exist_ok=True)
    (run.policy / "config.json").touch()
    with pytest.raises(ConfigError, match=r"learner\.lr: a resumed run must keep"):
        refuse_changes(changed, run)
    (run.policy / "config.json").unlink()  # one from elsewhere
    (run.checkpoints / "step_000001").mkdir()
    (run.checkpoints / "step_000001" / "COMPLETE").touch()
    refuse_changes(before, run)
    refuse_changes(config_file.load(config_file_path, ["run.steps=7"]), run)
    with pytest.raises(ConfigError) as caught:
        refuse_changes(changed, run)
    assert "learner.lr: a resumed run must keep 1e-06, got 0.5" in str(caught.value)
    assert "warm_start" in str(caught.value)
    assert "run.steps" not in str(caught.value)


def test_a_cluster_needs_a_redis_that_all_nodes_reach(config_file_path: Path):
    report = examine(config_file_path, address="auto")
    assert [p for p in report.problems if p.startswith("buffer.url: required with --address auto")]


def test_the_entry_of_a_ray_job_refuses_changes_too(config_file_path: Path, tmp_path: Path):
    from actors import train

    place = f"run.dir={tmp_path / 'runs'}"
    before = config_file.load(config_file_path, [place])
    run = RunDir.create(before.run.dir, before.run.name, config_file.dump(before), exist_ok=False)
    checkpoint = run.checkpoints / "step_000001"
    checkpoint.mkdir()
    (checkpoint / "COMPLETE").touch()
    with pytest.raises(ConfigError, match=r"learner\.lr: a resumed run must keep"):
        train.main([str(config_file_path), place, "learner.lr=0.5"])


def test_a_launcher_outside_the_cluster_is_refused(config_file_path: Path, tmp_path: Path):
    from actors import train

    run = RunDir(tmp_path / "demo")
    with pytest.raises(ConfigError, match="hone submit --address"):
        train.run(config_file.load(config_file_path), run_dir=run, address="ray://x")


def test_a_prompt_of_the_evaluation_must_fit_too(config_file_path: Path, tmp_path: Path):
    held_out = tmp_path / "eval.jsonl"
    prompts = ["What is 1 + 1?", "What is " + "1 + " * 60 + "1?"]
    held_out.write_text("\n".join(json.dumps({"prompt": p, "answer": "2"}) for p in prompts))
    [problem] = examine(
        config_file_path, f"tasks.eval={{use: file, settings: {{path: {held_out}}}}}"
    ).problems
    assert problem.startswith("policy.context_length: ")
    assert "1 or more of tasks.eval have more" in problem
