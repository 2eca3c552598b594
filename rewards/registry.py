"""Names of the built-in verifiers and tasksets, and how a config entry becomes a verifier.

Invariant: importing this module imports no plug-in; a plug-in is found by its string alone. A plain
function `fn(prompt, completion, reference) -> float | None` is as good as a class. Called by
`rewards.rubric`.
"""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from cluster import plugins
from cluster.config import VerifierConfig
from cluster.errors import ConfigError, HoneError
from cluster.types import TrajectoryGroup, Verdict
from rewards.base import Verifier, VerifierIO, abstention

VERIFIERS = {
    "math": "rewards.math_verifier:MathVerifier",
    "task": "rewards.gym_taskset:TasksetVerifier",
    "code": "rewards.code_verifier:CodeVerifier",
    "judge": "rewards.judge:JudgeVerifier",
    "generative": "rewards.judge:GenerativeVerifier",
    "format": "rewards.text_rules:FormatVerifier",
    "length": "rewards.text_rules:LengthVerifier",
    "efficiency": "rewards.trace_rules:EfficiencyVerifier",
    "language": "rewards.trace_rules:LanguageVerifier",
    "trace": "rewards.trace_rules:TraceVerifier",
    "repetition": "rewards.text_rules:RepetitionVerifier",
    "process": "rewards.process_reward:ProcessVerifier",
}
TASKSETS = {
    "reasoning_gym": "rewards.gym_taskset:ReasoningGymTaskset",
    "file": "rewards.table_taskset:FileTaskset",
    "hub": "rewards.table_taskset:HubTaskset",
    "champ": "rewards.champ_taskset:ChampTaskset",
}


def resolve_verifier(name: str, config: VerifierConfig) -> Callable[..., Any]:
    """The class or function behind `rewards.verifiers.<name>.use`. Raises `ConfigError`."""
    return plugins.resolve(config.use, VERIFIERS, f"rewards.verifiers.{name}.use")


def build_verifier(name: str, config: VerifierConfig) -> Verifier:
    """The verifier of one config entry, ready to score. Raises `ConfigError` naming the knob.

    Example: `build_verifier("correct", VerifierConfig(use="math"))`.
    """
    knob = f"rewards.verifiers.{name}"
    target = resolve_verifier(name, config)
    if inspect.isfunction(target):
        if config.settings:
            raise ConfigError(
                f"{knob}.settings: a plain function takes none, got {', '.join(config.settings)}; "
                "write a class to have settings"
            )
        _check_signature(target, knob)
        return FunctionVerifier(VERIFIERS.get(config.use, config.use))
    verifier = plugins.build(config.use, config.settings, VERIFIERS, knob)
    if not inspect.iscoroutinefunction(getattr(verifier, "score", None)):
        raise ConfigError(
            f"{knob}.use: {config.use!r} must have `async def score(self, group, io)` "
            "or be a plain function"
        )
    return verifier


def _check_signature(function: Callable[..., Any], knob: str) -> None:
    try:
        inspect.signature(function).bind("prompt", "completion", "reference")
    except TypeError as error:
        raise ConfigError(
            f"{knob}.use: a function must accept (prompt, completion, reference): {error}"
        ) from error


class FunctionVerifier:
    """Calls a plain function for each trajectory in a worker process, where it may hang or crash.

    The prompt is the task's last message. Example: with `def shout(prompt, completion, reference):
    return float(completion.isupper())`, the completion "YES" earns 1.0.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        task = group.task
        prompt = task.messages[-1].content if task.messages else ""
        return await asyncio.gather(
            *(self._check(prompt, t.text, task.reference, io) for t in group.trajectories)
        )

    async def _check(self, prompt: str, text: str, reference: str, io: VerifierIO) -> Verdict:
        try:
            score = await io.run_isolated(self._path, prompt, text, reference)
        except HoneError as error:
            return abstention(error)
        if score is None:
            return Verdict(score=None, error="the function abstained")
        if isinstance(score, (int, float)):
            return Verdict(score=float(score))
        return Verdict(
            score=None, error=f"the function must return a number or None, got {score!r}"
        )
