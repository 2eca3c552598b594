"""From a policy to a process reward model: sample traces, estimate their steps, train.

Invariant: traces come from the run's own program, tasks and rubric, by the weights of one
checkpoint; process signals have no say in the rewards that the labels are made of. Needs no Ray:
one engine in this process. Called by `hone rewards train-process`.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.placement import Placement
from actors.programs import PROGRAMS
from actors.rollout import RolloutProgram, RolloutRequest, Sampling
from actors.step_estimates import StepEstimator, StepValues
from cluster import plugins
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.types import Task
from rewards.rubric import Rubric
from rewards.step_format import DEFAULT_MARKER, StepFormat
from rewards.steps import compile_separator

GROUPS_IN_FLIGHT = 16
HELD_OUT_EVERY = 10  # every tenth task is not trained on, its steps measure the model
PROCESS = "process"


@dataclass(frozen=True)
class TraceSettings:
    """`traces` completions of each of `tasks` tasks, each step continued `completions` times.

    With 0 a step is worth the mean outcome of the task's traces that begin with it: cheapest where
    traces are short and much alike, as on toy tasks.
    """

    tasks: int = 128
    traces: int = 8
    completions: int = 4
    separator: str = r"\n+"
    seed: int = 0


class TraceSampler:
    """One engine with the policy of `policy_dir`, and the rubric of `config`."""

    def __init__(self, config: Config, policy_dir: Path) -> None:
        placement = Placement.of(config)
        os.environ.update(placement.rollout_options()["runtime_env"]["env_vars"])
        from actors.vllm_engine import VllmEngine  # reads the environment
        from learners.tokenizer import load_tokenizer

        program = config.rollout.program
        self._program: RolloutProgram = plugins.build(
            program.use, program.settings, PROGRAMS, "rollout.program"
        )
        self._config = config
        self._rubric = Rubric(_outcome_signals(config), str(policy_dir))
        self._tokenizer: Any = load_tokenizer(policy_dir)
        self._engine = VllmEngine(placement.engine_settings(policy_dir))

    async def start(self) -> None:
        await self._engine.start()

    async def close(self) -> None:
        self._engine.shutdown()
        await self._rubric.close()

    async def estimate(
        self, tasks: Sequence[Task], settings: TraceSettings
    ) -> AsyncIterator[list[StepValues]]:
        """Traces with step values, task by task as they are ready."""
        rollout = self._config.rollout
        stop = [self._tokenizer.eos_token_id]
        estimator = StepEstimator(
            self._engine,
            self.decode,
            self._rubric,
            Sampling(rollout.max_new_tokens, rollout.temperature, stop, settings.seed),
            compile_separator(settings.separator),
            settings.completions,
        )
        free = asyncio.Semaphore(GROUPS_IN_FLIGHT)

        async def one(index: int, task: Task) -> list[StepValues]:
            async with free:
                seed = settings.seed + index
                return await estimator.estimate(await self.sample(task, settings.traces, seed))

        chosen = random.Random(settings.seed).sample(list(tasks), min(settings.tasks, len(tasks)))
        for ready in asyncio.as_completed([one(i, task) for i, task in enumerate(chosen)]):
            yield await ready

    async def sample(self, task: Task, num_traces: int, seed: int) -> Any:
        """A scored group of one task."""
        from actors.rollout_worker import EngineIO

        rollout = self._config.rollout
        stop = [self._tokenizer.eos_token_id]
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, stop, seed)
        request = RolloutRequest(f"trace-{seed}-{task.task_id}", task, num_traces, sampling)
        io = EngineIO(self._engine, self._tokenizer, sampling, self._config.policy.context_length)
        return await self._rubric.score(await self._program.run(request, io))

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def train(
    policy_dir: Path, traces: Sequence[StepValues], settings: Any, out_dir: Path
) -> Iterator[Any]:
    """Fit `learners.process_model` to the traces and save it; yields its progress by epoch.

    The steps of every tenth task are held out and give the reported AUC.
    """
    import torch

    from learners.process_model import ProcessModel, StepExample
    from learners.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(policy_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": [DEFAULT_MARKER]})
    form = StepFormat()
    held_out_tasks = set(sorted({t.task.task_id for t in traces})[::HELD_OUT_EVERY])
    examples: dict[bool, list[StepExample]] = {False: [], True: []}
    for trace in traces:
        row = form.encode(tokenizer, trace.task, trace.steps)
        values = [float("nan") if value is None else value for value in trace.values]
        begin = len(form.encode(tokenizer, trace.task, []).token_ids)
        example = StepExample(row.token_ids, row.positions, values, begin)
        examples[trace.task.task_id in held_out_tasks].append(example)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ProcessModel(policy_dir, tokenizer, device, settings)
    yield from model.fit(examples[False], examples[True], settings)
    model.save(out_dir)


def _outcome_signals(config: Config) -> dict[str, Any]:
    """The rewarded signals that judge results, not steps. Raises `ConfigError` without any."""
    signals = {
        name: verifier
        for name, verifier in config.rewards.verifiers.items()
        if verifier.weight > 0 and verifier.use != PROCESS
    }
    if not signals:
        raise ConfigError("rewards.verifiers: no signal with a weight above 0 scores results")
    return signals
