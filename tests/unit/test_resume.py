"""What is said to be saved of a run is what its files hold."""

from pathlib import Path

from cluster.checkpoint_store import CheckpointStore
from cluster.ledger import Ledger
from cluster.resume import saved_state
from cluster.run_dir import RunDir
from cluster.run_state import RunState
from cluster.types import StepRecord


def test_what_is_saved_is_told_from_checkpoints_and_ledger(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "demo", "run: {}\n", exist_ok=False)
    assert saved_state(run) == "nothing saved yet: `--resume` starts from the beginning"
    store, ledger = CheckpointStore(run.checkpoints, keep=2), Ledger(run.ledger)
    store.take_over(0)
    for step in (1, 2, 3):
        ledger.commit(
            StepRecord(
                step=step, policy_version=step, group_ids=[], policy_versions=[],
                reward_versions={}, num_loss_tokens=0,
            )
        )  # fmt: skip
        if step == 1:
            save(store, step)
    (store.begin(3) / "half").touch()
    assert saved_state(run) == "last saved step is 1: `--resume` makes the 2 after it again"
    save(store, 3)
    assert saved_state(run) == "state saved at step 3"


def save(store: CheckpointStore, step: int) -> None:
    store.begin(step)
    store.commit(step, RunState(run_id="demo", step=step, policy_version=step, config_hash="x"))
