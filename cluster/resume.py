"""What a resumed run goes on from, and what it may not change: every key that shapes learning.

Invariant: the keys compared are those of `config_file.config_hash`, so what is refused here is what
a checkpoint would refuse; a state counts as saved when its checkpoint is complete. Called by
`hone train` and by the entry of a Ray job.
"""

from typing import cast

from cluster import config_file
from cluster.checkpoint_store import CheckpointStore
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.run_dir import RunDir


def refuse_changes(config: Config, run_dir: RunDir) -> None:
    """Raise `ConfigError` naming each key that shapes learning and differs from the run so far.

    A run that has come to neither a policy of its own nor a checkpoint has nothing that a change
    could contradict.
    """
    has_policy = (run_dir.policy / "config.json").is_file()
    if not has_policy and not any(run_dir.checkpoints.glob("step_*/COMPLETE")):
        return
    before, now = (_leaves(c) for c in (config_file.load(run_dir.config), config))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            "\n".join(
                f"{key}: a resumed run must keep {before.get(key)!r}, got {now.get(key)!r}; "
                "start a new one with `--run NEW`"
                for key in changed
            )
        )


def saved_state(run_dir: RunDir) -> str:
    """One sentence: which step of a run that has ended is saved, and how many after it are not."""
    steps = CheckpointStore(run_dir.checkpoints, keep=1).steps()
    if not steps:
        return "nothing saved yet: `--resume` starts from the beginning"
    num_lost = sum(record.step > steps[-1] for record in Ledger(run_dir.ledger).records())
    if num_lost:
        return f"last saved step is {steps[-1]}: `--resume` makes the {num_lost} after it again"
    return f"state saved at step {steps[-1]}"


def _leaves(config: Config) -> dict[str, object]:
    """Dotted key to value of everything in the configuration hash."""
    leaves: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, child in cast(dict[str, object], value).items():
                walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            leaves[prefix] = value

    walk("", config.model_dump(mode="json", exclude=config_file.BOOKKEEPING))
    return leaves
