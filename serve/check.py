"""What can be known to be wrong before an actor starts; `hone check` and `hone train` run it.

Invariant: nothing of a run is started or written; all problems are found in one pass, each one line
that names its config key.
"""

import asyncio
import math
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster import metrics, plugins, published, redis_client
from cluster.config import Config
from cluster.errors import ConfigError, HoneError, boundary
from cluster.redis_program import server_program
from cluster.replay_policy import policy_of
from cluster.types import Task
from serve import plan

GOLD_TASKS = 8
JUNK_TASKS = 16
REWARDS_DEADLINE_S = 120.0
BUFFER_RETRY_S = 2.0
LONGEST_PROMPTS = 500  # by characters; only these are tokenized

Announce = Callable[[str], None]


@dataclass
class CheckReport:
    """`problems` forbid a start, `warnings` do not; `plan` has rows (name, value)."""

    problems: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    plan: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @contextmanager
    def collect(self, stage: str) -> Generator[None]:
        """Turn any failure of the block into problem lines and go on."""
        try:
            with boundary(stage):
                yield
        except HoneError as error:
            self.problems += [line for line in str(error).splitlines() if line not in self.problems]


@dataclass(frozen=True)
class Prompts:
    """Lengths in tokens of the longest prompts, and the size of the policy."""

    longest: int
    too_long: dict[str, int]  # by split, those that have some
    num_parameters: int


def build(config: Config, *, address: str, announce: Announce) -> CheckReport:
    """Check `config` for a start on the Ray cluster `address`; `announce` gets progress lines."""
    report = CheckReport()
    _build_plugins(config, report)
    with report.collect("trackers"):
        metrics.require_trackers(list(config.run.trackers))
    with report.collect("resources"):
        _check_resources(config, address, report)
    with report.collect("buffer"):
        _check_buffer(config, address)
    tasks: dict[str, list[Task]] = {}
    with report.collect("tasks"):
        from rewards.tasksets import load_splits

        tasks["train"], tasks["eval"] = load_splits(config.tasks)
        announce(f"  {len(tasks['train'])} train tasks, {len(tasks['eval'])} eval tasks")
    with report.collect("rollout.program"):
        _check_program(config, tasks.get("train", []))
    prompts = None
    if tasks.get("train"):
        with report.collect("policy"):
            announce(f"  preparing the {config.policy.type} policy and its tokenizer")
            prompts = _measure_prompts(config, tasks)
            _check_prompts(config, prompts)
            if address == "local":
                _check_memory(config, prompts.num_parameters)
        with report.collect("rewards"):
            announce(f"  rewarding {GOLD_TASKS} gold answers and some junk")
            _check_rewards(config, tasks["train"], report)
    if not report.problems and prompts is not None:
        sizes = {split: len(found) for split, found in tasks.items()}
        report.plan = plan.rows(config, sizes, prompts.longest, prompts.num_parameters)
    return report


def _build_plugins(config: Config, report: CheckReport) -> None:
    from actors.programs import PROGRAMS
    from learners.credit import build_credit, check_critic, is_per_token
    from learners.lora import Lora
    from learners.objectives import WeightedLosses
    from learners.value_loss import build_value_loss

    program = config.rollout.program
    with report.collect("rollout.program"):
        plugins.build(program.use, program.settings, PROGRAMS, "rollout.program")
    with report.collect("buffer.policy"):
        policy_of(config)
    with report.collect("objective.credit"):
        check_critic(config.critic, build_credit(config.objective.credit))
    if config.critic is not None:
        with report.collect("critic.loss"):
            build_value_loss(config.critic)
        if config.tasks.skip_uniform:
            report.warnings.append(
                "tasks.skip_uniform: a critic must also see groups that agree: set it to false"
            )
    with report.collect("objective.losses"):
        losses = WeightedLosses(config.objective)
        if is_per_token(build_credit(config.objective.credit)):
            losses.refuse_token_credit()
        has_one_update = config.learner.minibatches == config.learner.epochs == 1
        idle = losses.with_flag("needs_several_updates") if has_one_update else {}
        report.warnings += [
            f"learner.minibatches, learner.epochs: {use} is 0 as long as a step has only one "
            "update: set either above 1"
            for use in idle.values()
        ]
        _check_guided(config, report)
    with report.collect("learner.lora"):
        Lora.of(config)


def _check_resources(config: Config, address: str, report: CheckReport) -> None:
    from actors import devices
    from actors.capacity import ClusterNode, shortages
    from actors.placement import Placement, on_this_machine

    if address != "local":
        return
    placement = Placement.of(on_this_machine(config))
    available = plan.available_cpus(config)
    if placement.is_gpu:
        machine = ClusterNode("this machine", {"GPU": plan.available_gpus(), "CPU": math.inf}, {})
        requests = [*placement.requests(), *placement.reward_requests()]
        report.problems += shortages(requests, [machine])
    report.problems += devices.problems(placement)
    if placement.total_cpus > available:
        report.warnings.append(
            f"rollout.workers ({config.rollout.workers}) and learner.world_size "
            f"({config.learner.world_size}) share {available} CPUs: they will slow each other down"
        )


def _check_buffer(config: Config, address: str) -> None:
    url = redis_client.buffer_url(config.buffer, address)
    if url is None:
        server_program()
    else:
        redis_client.connect(url, retry_s=BUFFER_RETRY_S).close()


def _check_program(config: Config, tasks: list[Task]) -> None:
    from actors.programs import PROGRAMS, prefix_length
    from actors.rollout import ChecksTasks

    prefix_length(config)
    program = config.rollout.program
    built = plugins.build(program.use, program.settings, PROGRAMS, "rollout.program")
    if tasks and isinstance(built, ChecksTasks):
        built.check(tasks)


def _check_guided(config: Config, report: CheckReport) -> None:
    """What a hint that training does not see, or a given text that is learned, asks of losses and
    credit.
    """
    from actors.programs import needs_guided_loss
    from learners.credit import ValueBased, build_credit, whitening_of
    from learners.objectives import WeightedLosses

    if not needs_guided_loss(config):
        return
    WeightedLosses(config.objective).require_guided()
    credit = build_credit(config.objective.credit)
    if isinstance(credit, ValueBased) and whitening_of(credit) != "none":
        report.warnings.append(
            "objective.credit.settings.whitening: with a critic and hints, whitening pushes failed "
            "rollouts down more than it lifts hinted passes, and little is learned: set it to false"
        )


def _measure_prompts(config: Config, splits: dict[str, list[Task]]) -> Prompts:
    """Prepare the policy as a run would (a tiny one in a temporary place) and tokenize prompts."""
    from learners.policy_dir import CACHE_DIR, prepare
    from learners.tokenizer import load_tokenizer, render

    train, room = splits["train"], _prompt_room(config)
    texts = [m.content for t in train for m in t.messages]
    texts += [task.solution or task.reference for task in train]
    asked = {"train": train, "eval": splits["eval"][: config.eval.tasks]}
    with tempfile.TemporaryDirectory(prefix="hone-check-") as place:
        out_dir = Path(place) / "policy"
        policy_dir = prepare(config.policy, texts, CACHE_DIR, out_dir, config.run.seed)
        tokenizer = load_tokenizer(policy_dir)
        lengths = {
            split: [len(render(tokenizer, task.messages)) for task in _longest(tasks)]
            for split, tasks in asked.items()
        }
        too_long = {split: sum(n > room for n in found) for split, found in lengths.items()}
        return Prompts(
            longest=max(n for found in lengths.values() for n in found),
            too_long={split: count for split, count in too_long.items() if count},
            num_parameters=plan.num_parameters(policy_dir),
        )


def _longest(tasks: list[Task]) -> list[Task]:
    by_length = sorted(tasks, key=lambda t: -sum(len(m.content) for m in t.messages))
    return by_length[:LONGEST_PROMPTS]


def _check_prompts(config: Config, prompts: Prompts) -> None:
    if prompts.too_long:
        counts = [f"{count} or more of tasks.{split}" for split, count in prompts.too_long.items()]
        raise ConfigError(
            f"policy.context_length: prompts must leave room for rollout.max_new_tokens, so have "
            f"at most {_prompt_room(config)} tokens; {' and '.join(counts)} "
            f"have more, the longest {prompts.longest}"
        )


def _check_memory(config: Config, num_parameters: int) -> None:
    """Versions of the weights are handed over in memory: those that are kept and one in the
    making.
    """
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    num_files = published.KEEP_FILES + 1
    needed = num_files * num_parameters * (4 if config.policy.dtype == "float32" else 2)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"policy: {num_files} versions of its weights need {needed / 2**30:.2f} GiB of "
            f"/dev/shm, which has {free / 2**30:.2f} free (in a container: `--shm-size`)"
        )


def _prompt_room(config: Config) -> int:
    return config.policy.context_length - config.rollout.max_new_tokens


def _check_rewards(config: Config, tasks: list[Task], report: CheckReport) -> None:
    from rewards.golden import golden_check
    from rewards.rubric import Rubric
    from rewards.self_check import gold_check, junk_probe

    apart = [n for n, v in config.rewards.verifiers.items() if v.pool and v.pool.runtime_env]
    if apart:
        report.warnings.append(
            f"rewards.verifiers.{apart[0]}: has its own pool.runtime_env, so gold answers are "
            "checked when the run starts"
        )
        return

    async def probe() -> None:
        rubric = Rubric(config.rewards.verifiers)
        try:
            async with asyncio.timeout(REWARDS_DEADLINE_S):
                report.problems += await golden_check(rubric)
                if refused := await gold_check(rubric, tasks, GOLD_TASKS):
                    others = f" (one of {len(refused)} such tasks)" if len(refused) > 1 else ""
                    report.problems.append(f"rewards.verifiers: {refused[0]}{others}")
                report.warnings += [
                    f"rewards.verifiers: {finding}"
                    for finding in await junk_probe(rubric, tasks[:JUNK_TASKS])
                ]
        except TimeoutError:
            raise ConfigError(
                f"rewards.verifiers: checking {GOLD_TASKS} gold answers must end in "
                f"{REWARDS_DEADLINE_S:.0f} s"
            ) from None
        finally:
            await rubric.close()

    asyncio.run(probe())
