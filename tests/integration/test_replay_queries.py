"""What a living run's buffer holds, and what moved a step, without changing it."""

from pathlib import Path

import pytest

from cluster import config_file
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.run_dir import RunDir
from cluster.types import StepRecord
from serve import replay_queries
from tests.learner_cases import make_groups


@pytest.fixture
def run(tiny_config: Config, redis_url: str, tmp_path: Path) -> RunDir:
    """A run whose first step used two of its three groups; one left with a checkpoint."""
    config = tiny_config.model_copy(
        update={"buffer": tiny_config.buffer.model_copy(update={"url": redis_url})}
    )
    run = RunDir.create(tmp_path / "runs", tmp_path.name, config_file.dump(config), exist_ok=False)
    buffer = ReplayBuffer(
        connect(redis_url), run.name, capacity_groups=8, lease_s=60, max_deliveries=3
    )
    groups = make_groups(1)
    for group in groups:
        buffer.add(group)
    buffer.claim(3, owner="test", wait_s=0)
    buffer.consume(["g1-0"], step=1)
    buffer.acknowledge(1)
    buffer.consume(["g1-1"], step=2)
    ledger = Ledger(run.ledger)
    for step, ids in ((1, ["g1-0"]), (2, ["g1-1"])):
        ledger.commit(
            StepRecord(
                step=step, policy_version=step, group_ids=ids, policy_versions=[0],
                reward_versions={"correct": ["1-a"]}, num_loss_tokens=9,
            )
        )  # fmt: skip
    return run


def test_why_names_what_moved_a_step(run: RunDir) -> None:
    why = replay_queries.why(run, 2)
    assert (why.record.policy_version, why.num_gone) == (2, 0)
    [group] = why.groups
    assert [t.reward for t in group.trajectories] == [0.0, 1.0, 0.5]
    assert group.trajectories[0].policy_versions == [0]
    assert replay_queries.why(run, 1).num_gone == 1
    with pytest.raises(ConfigError, match=r"step 9 is not in the ledger .* 1 to 2"):
        replay_queries.why(run, 9)


def test_a_look_changes_nothing(run: RunDir) -> None:
    before = replay_queries.stats(run)
    assert (before.leased, before.consumed, before.acknowledged) == (1, 1, 1)
    assert replay_queries.show(run, "g1-2").group_id == "g1-2"
    with pytest.raises(ConfigError, match="not in the buffer"):
        replay_queries.show(run, "unknown")
    assert replay_queries.stats(run) == before
