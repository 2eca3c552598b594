"""The actor of a verifier that has a pool of its own: scores whole groups with that one verifier.

Invariant: it knows one version of one verifier for life and imports it in its own runtime
environment; time limits, abstentions and stamps are those of the rubric, of which it runs one with
a single signal. Created by `actors.verifier_pool`.
"""

import os

import msgspec

from cluster import log, wire
from cluster.config import VerifierConfig
from cluster.types import TrajectoryGroup, Verdict
from rewards.base import GoldenPair
from rewards.rubric import Rubric


class SignalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a fresh worker found its verifier to be."""

    pid: int
    version: str
    example: str
    golden: list[GoldenPair]
    gold_score: float


class VerifierWorker:
    """One verifier. Raises `ConfigError` when it cannot be built."""

    def __init__(self, name: str, config: VerifierConfig, run_dir: str, policy_dir: str) -> None:
        log.setup(f"verifier-{name}-{os.getpid()}", run_dir)
        self._name = name
        self._rubric = Rubric({name: config}, policy_dir)

    async def facts(self) -> SignalFacts:
        (version,) = self._rubric.versions.values()
        return SignalFacts(
            pid=os.getpid(),
            version=version,
            example=next(iter(self._rubric.examples), ""),
            golden=self._rubric.golden[self._name],
            gold_score=self._rubric.gold_scores[self._name],
        )

    async def score(self, encoded: bytes) -> list[Verdict]:
        """One verdict per trajectory of an encoded group."""
        return await self._rubric.ask(self._name, wire.decode(encoded, TrajectoryGroup))
