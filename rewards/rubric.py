"""The rubric: runs all verifiers on a group and turns their verdicts into rewards.

Invariant: a verifier that raises, hangs or answers nonsense abstains for the whole group with
`error` set; a reward is known only when every weighted verdict is. Every verdict carries its
signal's name and version. Owned by a reward worker (`actors.reward_worker`) and by the self-checks;
one instance per process is enough.
"""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from cluster.config import VerifierConfig
from cluster.errors import ConfigError, DeadlineError, HoneError, boundary
from cluster.reward_state import RUBRIC
from cluster.types import Trajectory, TrajectoryGroup, TrajectoryStatus, Verdict
from rewards.base import GoldenPair, HasExample, HasGolden, HasGoldScore, Verifier, abstention
from rewards.isolation import IsolatedPool
from rewards.registry import build_verifier
from rewards.versions import reward_version


@dataclass(frozen=True)
class Elsewhere:
    """A verifier that lives in a pool of other processes, which keep its time limit themselves."""

    version: str
    verifier: Verifier


@dataclass(frozen=True)
class _Signal:
    name: str
    config: VerifierConfig
    version: str
    verifier: Verifier
    limit_s: float | None  # of one group; None where another process keeps it
    golden: list[GoldenPair]  # the verifier's own and the config's

    @property
    def weight(self) -> float:
        return self.config.weight

    @property
    def gold_score(self) -> float:
        return self.verifier.gold_score if isinstance(self.verifier, HasGoldScore) else 1.0


class Rubric:
    """Named verifiers with weights; the reward is the weighted sum of their scores.

    Example: signals `correct` (weight 1, score 1.0) and `format` (weight 0.2, score 0.5) give 1.1;
    were `format` to abstain, the reward would be None, with weight 0 it would be 1.0.
    """

    def __init__(
        self,
        verifiers: dict[str, VerifierConfig],
        policy_dir: str = "",
        elsewhere: Mapping[str, Elsewhere] | None = None,
    ) -> None:
        """Build every verifier that is not `elsewhere`. Raises `ConfigError` naming the knob."""
        if RUBRIC in verifiers:
            raise ConfigError(f"rewards.verifiers.{RUBRIC}: this name is taken, choose another")
        self._signals = [
            _signal(name, config, (elsewhere or {}).get(name)) for name, config in verifiers.items()
        ]
        self._pool = IsolatedPool()
        self._policy_dir = policy_dir

    @property
    def versions(self) -> dict[str, str]:
        """Signal to `reward_version`: changes when the verifier's code or settings change."""
        return {signal.name: signal.version for signal in self._signals}

    @property
    def version(self) -> str:
        """Eight hex digits over all that shapes or guards a reward: signals, weights, time limits,
        golden sets, pools.
        """
        content = [
            [s.name, s.version, s.weight, s.config.timeout_s]
            + ([s.config.pool.model_dump()] if s.config.pool else [])
            + ([s.config.golden] if s.config.golden else [])
            for s in self._signals
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]

    @property
    def full_reward(self) -> float:
        """What a flawless completion earns: 1 from each rewarded signal, 0 from each penalty."""
        return sum(max(0.0, signal.weight) for signal in self._signals)

    @property
    def gold_scores(self) -> dict[str, float]:
        """What each signal must give a gold answer: 1, or less where a verifier says so."""
        return {signal.name: signal.gold_score for signal in self._signals}

    @property
    def gold_reward(self) -> float:
        """What a gold answer must earn: the full reward but for verifiers that never give a 1."""
        return sum(max(0.0, signal.weight) * signal.gold_score for signal in self._signals)

    @property
    def examples(self) -> list[str]:
        """Forms that the verifiers accept, with `{answer}` where the answer goes."""
        verifiers = [signal.verifier for signal in self._signals]
        return [v.example for v in verifiers if isinstance(v, HasExample) and v.example]

    @property
    def golden(self) -> dict[str, list[GoldenPair]]:
        """Completions with known scores, by signal: the verifier's own and the config's."""
        return {signal.name: signal.golden for signal in self._signals}

    async def ask(self, name: str, group: TrajectoryGroup) -> list[Verdict]:
        """The verdicts of one signal, stamped."""
        (signal,) = (s for s in self._signals if s.name == name)
        return await self._ask(signal, group)

    async def score(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """The group with verdicts, rewards and reward versions; the given one is left as it is."""
        columns = await asyncio.gather(*(self._ask(signal, group) for signal in self._signals))
        trajectories = [
            msgspec.structs.replace(t, verdicts=verdicts, reward=self._reward(verdicts))
            for t, verdicts in zip(
                group.trajectories, map(list, zip(*columns, strict=True)), strict=True
            )
        ]
        return msgspec.structs.replace(
            group, trajectories=trajectories, reward_versions=self.versions
        )

    async def close(self) -> None:
        """End the worker processes."""
        await asyncio.to_thread(self._pool.close)

    def _reward(self, verdicts: list[Verdict]) -> float | None:
        total, is_rewarded = 0.0, False
        for signal, verdict in zip(self._signals, verdicts, strict=True):
            if signal.weight == 0.0:
                continue
            if verdict.score is None:
                return None
            total, is_rewarded = total + signal.weight * verdict.score, True
        return total if is_rewarded else None

    async def _ask(self, signal: _Signal, group: TrajectoryGroup) -> list[Verdict]:
        """Stamped verdicts of one verifier, whatever it does."""
        started = time.perf_counter()
        try:
            with boundary(f"rewards.verifiers.{signal.name}"):
                verdicts = await self._score_in_time(signal, group)
        except HoneError as error:
            verdicts = [abstention(error) for _ in group.trajectories]
        latency_s = time.perf_counter() - started
        return [
            msgspec.structs.replace(
                verdict,
                name=signal.name,
                reward_version=signal.version,
                latency_s=latency_s,
            )
            for verdict in verdicts
        ]

    async def _score_in_time(self, signal: _Signal, group: TrajectoryGroup) -> list[Verdict]:
        try:
            async with asyncio.timeout(signal.limit_s) as clock:
                io = GroupIO(self._pool, signal.config.timeout_s, clock, self._policy_dir)
                verdicts = await signal.verifier.score(group, io)
        except TimeoutError:
            knob = f"rewards.verifiers.{signal.name}"
            raise DeadlineError(
                knob, f"no verdicts in {signal.config.timeout_s:g} s ({knob}.timeout_s)"
            ) from None
        if len(verdicts) != len(group.trajectories):
            raise HoneError(
                f"must give one verdict per trajectory: {len(verdicts)} verdicts, "
                f"{len(group.trajectories)} trajectories"
            )
        return [_admit(v, t) for v, t in zip(verdicts, group.trajectories, strict=True)]


def _signal(name: str, config: VerifierConfig, elsewhere: Elsewhere | None) -> _Signal:
    if elsewhere is None:
        verifier, limit_s = build_verifier(name, config), config.timeout_s
        version = reward_version(name, config)
    else:
        verifier, limit_s, version = elsewhere.verifier, None, elsewhere.version
    try:
        given = msgspec.convert(config.golden, list[GoldenPair])
    except msgspec.ValidationError as error:
        raise ConfigError(f"rewards.verifiers.{name}.golden: {error}") from None
    own = list(verifier.golden) if isinstance(verifier, HasGolden) else []
    golden = own if elsewhere else own + given  # what lives elsewhere knows the config's
    return _Signal(name, config, version, verifier, limit_s, golden)


class GroupIO:
    """`VerifierIO` for one verifier and one group, which run against `clock`."""

    def __init__(
        self, pool: IsolatedPool, timeout_s: float, clock: asyncio.Timeout, policy_dir: str
    ) -> None:
        self.timeout_s = timeout_s
        self.policy_dir = policy_dir
        self._pool = pool
        self._clock = clock
        self._left_s = timeout_s
        self._num_waiting = 0

    @property
    def left_s(self) -> float:
        if self._num_waiting:
            return self._left_s
        return (self._clock.when() or 0.0) - asyncio.get_running_loop().time()

    async def run_isolated(
        self, function: str, *args: object, timeout_s: float | None = None
    ) -> object:
        """See `VerifierIO`. The clock stands still until a worker is ready."""
        limit_s = self.timeout_s / 2 if timeout_s is None else min(timeout_s, self.timeout_s)
        is_running = False

        def running() -> None:
            nonlocal is_running
            if not is_running:
                is_running = True
                self._start_clock()

        self._stop_clock()
        try:
            return await self._pool.run(function, *args, timeout_s=limit_s, on_running=running)
        finally:
            running()

    def _stop_clock(self) -> None:
        self._num_waiting += 1
        if self._num_waiting == 1 and not self._clock.expired():
            self._left_s = (self._clock.when() or 0.0) - asyncio.get_running_loop().time()
            self._clock.reschedule(None)

    def _start_clock(self) -> None:
        self._num_waiting -= 1
        if self._num_waiting == 0 and not self._clock.expired():
            self._clock.reschedule(asyncio.get_running_loop().time() + self._left_s)


def _admit(verdict: Verdict, trajectory: Trajectory) -> Verdict:
    """The verdict, or an abstention where the score is none or the rollout had failed."""
    if trajectory.status is TrajectoryStatus.ERROR:
        return Verdict(score=None, error="the rollout failed, there is nothing to check")
    if verdict.score is not None and not math.isfinite(verdict.score):
        return Verdict(score=None, error=f"the score must be finite, got {verdict.score}")
    return msgspec.structs.replace(
        verdict, score=None if verdict.score is None else float(verdict.score)
    )
