"""The configuration: YAML plus overrides, and errors that name the key and the nearest one."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cluster import config_file
from cluster.config import Config
from cluster.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALLEST: dict[str, Any] = {
    "policy": {"type": "tiny"},
    "tasks": {"train": {"use": "file", "settings": {"path": "tasks.jsonl"}}},
    "rewards": {"verifiers": {"correct": {"use": "math"}}},
}


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """Problem lines without the file name in front."""
    with pytest.raises(ConfigError) as caught:
        config_file.load(path, list(overrides))
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_three_sections_are_enough(config_path: Path):
    config = config_file.load(config_path)
    assert config.policy.type == "tiny"
    assert config.objective.losses["policy"].use == "policy_gradient"
    assert config.max_groups_in_flight == 2 * config.rollout.groups_per_step


def test_overrides_are_yaml_values(config_path: Path):
    config = config_file.load(
        config_path,
        [
            "rollout.group_size=4",
            "learner.lr=3e-5",
            "run.trackers=[]",
            "warm_start.steps=7",
            "rewards.verifiers.correct.weight=0.5",
            "run.name=a=b",
            "buffer.url=null",
        ],
    )
    assert config.rollout.group_size == 4
    assert config.learner.lr == 3e-5
    assert config.run.trackers == []
    assert config.warm_start is not None
    assert config.warm_start.steps == 7
    assert config.rewards.verifiers["correct"].weight == 0.5
    assert config.run.name == "a=b"
    assert config.buffer.url is None


def test_numbers_are_those_that_people_mean(config_path: Path):
    """PyYAML reads 1e-3 as text; settings of plug-ins have no types of their own."""
    credit = "objective.credit={use: grpo, settings: {epsilon: 1e-6}}"
    config = config_file.load(config_path, [credit, "run.name='1e3'"])
    assert config.objective.credit.settings == {"epsilon": 1e-6}
    config_path.write_text(config_file.dump(config))
    again = config_file.load(config_path)
    assert again == config
    assert again.run.name == "1e3"


def test_the_last_override_wins(config_path: Path):
    config = config_file.load(config_path, ["run.steps=1", "run.steps=2"])
    assert config.run.steps == 2


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rolout.group_size=4", "rolout: unknown key (did you mean rollout?)"),
        ("rollout.group_sise=4", "did you mean rollout.group_size?"),
        ("policy.hiden_size=64", "did you mean policy.hidden_size?"),
        ("rewards.verifiers.correct.wieght=1", "did you mean rewards.verifiers.correct.weight?"),
        ("warm_start.example=7", "did you mean warm_start.examples?"),
        ("tasks.train.setings={}", "did you mean tasks.train.settings?"),
        ("run.zzzzzz=1", "run.zzzzzz: unknown key (known here: name, dir, seed,"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(config_path: Path, override: str, problem: str):
    (line,) = problems(config_path, override)
    assert line.startswith(override.partition("=")[0].split(".")[0])
    assert problem in line


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("rollout.group_size=1", "rollout.group_size: input should be greater than or equal to 2"),
        ("run.steps=many", "run.steps: "),
        ("run.steps=true", "run.steps: must be a number, got true"),
        ("learner.lr=0", "learner.lr: "),
        ("learner.schedule=sometimes", "learner.schedule: "),
        ("policy.type=huge", "policy"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(config_path: Path, override: str, start: str):
    (line,) = problems(config_path, override)
    assert line.startswith(start)
    assert override.partition("=")[2] in line


def test_all_problems_come_at_once(config_path: Path):
    lines = problems(config_path, "run.steps=0", "learner.lr=-1", "rollout.grup_size=2")
    keys = sorted(line.partition(":")[0] for line in lines)
    assert keys == ["learner.lr", "rollout.grup_size", "run.steps"]


def test_a_missing_section_is_named(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert sorted(problems(path)) == [
        "policy: required, but not given",
        "rewards: required, but not given",
        "tasks: required, but not given",
    ]


@pytest.mark.parametrize(
    ("override", "knobs"),
    [
        ("rollout.max_new_tokens=1024", ["rollout.max_new_tokens", "policy.context_length"]),
        ("learner.microbatch_tokens=100", ["learner.microbatch_tokens", "policy.context_length"]),
        ("buffer.capacity_groups=47", ["buffer.capacity_groups", "48", "rollout.max_policy_age"]),
        ("rewards.verifiers={}", ["rewards.verifiers"]),
    ],
)
def test_sections_must_fit_together(config_path: Path, override: str, knobs: list[str]):
    (line,) = problems(config_path, override)
    assert all(knob in line for knob in knobs)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rollout", "must look like section.key=value"),
        ("--rollout.group_size=4", "must look like section.key=value"),
        ("run.name={", "not valid YAML"),
        ("policy.type.deeper=1", "'type' is a value, not a section"),
    ],
)
def test_an_override_that_cannot_be_read(config_path: Path, override: str, problem: str):
    (line,) = problems(config_path, override)
    assert problem in line


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a: [", "not valid YAML"), ("- 1", "must be a mapping of sections, got list")],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    (line,) = problems(path)
    assert problem in line


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such config file"):
        config_file.load(tmp_path / "gone.yaml")


@pytest.mark.parametrize("layout", ["split", "colocated"])
def test_a_broadcast_is_refused_where_members_would_share_a_gpu(config_path: Path, layout: str):
    shared = [f"resources.layout={layout}", "resources.engine_gpu_share=0.4"]
    [problem] = problems(config_path, "sync.transport=broadcast", *shared)
    assert "sync.transport broadcast needs resources.layout split" in problem


def test_engines_that_sleep_while_the_learner_works_run_nothing_ahead(config_path: Path):
    turns = ["resources.layout=alternating", "resources.engine_gpu_share=0.4"]
    [problem] = problems(config_path, *turns, "rollout.max_policy_age=1")
    assert "resources.layout alternating needs rollout.max_policy_age 0" in problem
    config = config_file.load(config_path, [*turns, "rollout.max_policy_age=0"])
    assert config.resources.layout == "alternating"


def test_the_dump_resolves_to_the_same_config(config_path: Path):
    config = config_file.load(config_path, ["rollout.group_size=4", "warm_start.steps=3"])
    assert config_file.parse(yaml.safe_load(config_file.dump(config)), "dump") == config


def test_a_config_cannot_be_changed(config_path: Path):
    config = config_file.load(config_path)
    with pytest.raises(ValidationError):
        config.run.steps = 3  # type: ignore[misc]


def test_the_hash_covers_what_shapes_learning_only(config_path: Path):
    def hashed(*overrides: str) -> str:
        return config_file.config_hash(config_file.load(config_path, list(overrides)))

    assert hashed("run.name=other", "run.steps=7", "eval.every=3", "resources.cpus=1") == hashed()
    assert hashed("learner.world_size=2", "rollout.workers=3", "sync.timeout_s=9") == hashed()
    assert hashed("sync.transport=broadcast") == hashed()
    assert hashed("learner.lr=0.5") != hashed()
    assert hashed("run.seed=1") != hashed()  # it decides which tasks come, and in which order
    assert hashed("rewards.verifiers.correct.weight=2") != hashed()


def test_a_key_that_a_later_release_adds_changes_no_hash(config_path: Path):
    class Later(Config):
        added: int = 1

    config = config_file.load(config_path)
    later = Later.model_validate(config.model_dump())
    assert config_file.config_hash(later) == config_file.config_hash(config)
    changed = later.model_copy(update={"added": 2})
    assert config_file.config_hash(changed) != config_file.config_hash(config)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deploy/configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_shipped_config_is_valid(path: Path):
    assert isinstance(config_file.load(path), Config)
