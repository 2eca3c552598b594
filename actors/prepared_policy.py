"""What all parts of a run must know of its policy before any of them can load it.

Invariant: the libraries that make a policy directory and read a tokenizer are imported by a process
that ends, never by the controller, and once per run: a run that goes on from a checkpoint finds
what was known in `policy.json`, so nobody who is waiting for it to work again waits for that.
Called by `actors.bring_up`.
"""

import random
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import QUIET_ENV
from actors.probes import NUM_SEQUENCES
from actors.programs import needs_guided_loss
from actors.stages import within
from cluster.config import Config
from cluster.errors import StageError
from cluster.run_dir import RunDir
from cluster.types import Task
from learners.records import Example


@dataclass(frozen=True)
class PreparedPolicy:
    """A loadable policy directory, the token that ends a completion, a few prompts as token ids,
    and what to warm it up on.
    """

    directory: Path
    stop_token_id: int
    prompts: list[list[int]]
    examples: list[Example]


@dataclass(frozen=True)
class Kept:
    """`places`: where that start was to put what it made, and what all nodes see."""

    policy: PreparedPolicy
    places: list[str]


async def make(
    config: Config, tasks: list[Task], run: RunDir, has_checkpoint: bool
) -> PreparedPolicy:
    """Made on this node, which may be the only one with a way to a model hub; examples only where
    no checkpoint holds what came of them.
    """
    run.prepared.unlink(missing_ok=True)  # of a start with another config, perhaps
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    prepare = ray.remote(max_calls=1, max_retries=0)(prepare_policy).options(
        num_cpus=0, runtime_env={"env_vars": QUIET_ENV}, scheduling_strategy=here
    )
    policy = await within(
        prepare.remote(config, tasks, run.policy, has_checkpoint, run.models),
        stage="policy",
        what="the policy directory",
        deadline_s=config.resources.start_timeout_s,
        knob="resources.start_timeout_s",
    )
    with suppress(OSError):  # a full disk: it is made again
        keep(run, policy)
    return policy


def keep(run: RunDir, policy: PreparedPolicy) -> None:
    """Without its examples: no later start needs them."""
    file = run.prepared.with_suffix(".tmp")
    kept = Kept(replace(policy, examples=[]), _places(run))
    file.write_bytes(msgspec.json.encode(kept, enc_hook=str))
    file.replace(run.prepared)


def known(run: RunDir) -> PreparedPolicy | None:
    """What an earlier start of this run prepared, where its directory is still there, and the run
    has not moved, nor from one machine to a cluster.
    """
    try:
        kept = msgspec.json.decode(
            run.prepared.read_bytes(), type=Kept, dec_hook=lambda kind, text: kind(text)
        )
    except (OSError, msgspec.MsgspecError):
        return None
    is_there = (kept.policy.directory / "config.json").is_file()
    return kept.policy if is_there and kept.places == _places(run) else None


def _places(run: RunDir) -> list[str]:
    return [str(run.policy), str(run.models)]


def prepare_policy(
    config: Config,
    tasks: list[Task],
    out_dir: Path,
    has_checkpoint: bool,
    models: Path | None,
) -> PreparedPolicy:
    """Also what a warm start learns from `tasks`, unless a checkpoint holds what came of it. Raises
    `ConfigError` where a loss is wrong for the hints of the program: not every start was checked.
    """
    from learners.objectives import WeightedLosses
    from learners.policy_dir import CACHE_DIR, prepare
    from learners.tokenizer import encode_completion, load_tokenizer, render

    if needs_guided_loss(config):
        WeightedLosses(config.objective).require_guided()
    texts = [m.content for t in tasks for m in t.messages]
    texts += [t.solution or t.reference for t in tasks]
    policy_dir = prepare(config.policy, texts, CACHE_DIR, out_dir, config.run.seed, models)
    tokenizer = load_tokenizer(policy_dir)
    stop = tokenizer.eos_token_id
    if not isinstance(stop, int):
        raise StageError("policy", f"the tokenizer in {policy_dir} names no end-of-sequence token")
    examples: list[Example] = []
    if config.warm_start is not None and not has_checkpoint:
        rng = random.Random(config.run.seed)
        for task in tasks[: config.warm_start.examples]:
            is_direct = rng.random() < config.warm_start.direct_fraction
            text = task.reference if is_direct or not task.solution else task.solution
            if text:
                examples.append(
                    (render(tokenizer, task.messages), encode_completion(tokenizer, text))
                )
    prompts = [render(tokenizer, task.messages) for task in tasks[:NUM_SEQUENCES]]
    return PreparedPolicy(policy_dir, stop, prompts, examples)
