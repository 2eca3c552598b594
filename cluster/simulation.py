"""A run as discrete events: what a split of the devices will give, before it is bought.

Invariant: groups, slots, seats and versions obey the rules of the conductor: slots are
`(max_policy_age + 1) * groups_per_step` and come back after the sync; in `sync` mode groups are
taken in draw order in quarters of a step, otherwise as they come with seats kept for those that
others overtook (`actors.intake`), from when the sync needs the learner no more. Only durations are
models, and they come from a measured `StageProfile`. Time is simulated, in seconds. Called by
`serve.scaling` and the benchmarks.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from functools import partial
from statistics import fmean

import msgspec

from cluster.simulated_engine import Engine, Group
from cluster.simulated_intake import intake_of
from cluster.stage_profile import Pace, StageProfile


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What the knobs of the same names set: `rollout.workers`, `learner.world_size`, ..."""

    workers: int
    world_size: int
    max_policy_age: int
    groups_per_step: int

    @property
    def num_slots(self) -> int:
        return (self.max_policy_age + 1) * self.groups_per_step


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the simulated steps after a warm-up; the counts are of all steps.

    `rollout_idle` is the share of time in which an engine has no sequence to generate, the mean
    over engines; `learner_idle` the share in which the learner waits for groups or for a sync.
    """

    layout: Layout
    step_s: float
    groups_per_s: float
    age_mean: float
    age_max: int
    rollout_idle: float
    learner_idle: float
    num_drawn: int
    num_used: int
    num_dropped: int
    num_under_way: int


def simulate(profile: StageProfile, layout: Layout, *, steps: int = 20, seed: int = 0) -> Forecast:
    """Run `steps` steps after a warm-up of `max_policy_age + 2`."""
    return _Run(profile, layout, random.Random(seed)).forecast(steps)


class _Run:
    """Events in order of time; ties in the order in which they were planned."""

    def __init__(self, profile: StageProfile, layout: Layout, rng: random.Random) -> None:
        self._profile = profile
        self._layout = layout
        self._rng = rng
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._engines = [Engine(profile) for _ in range(layout.workers)]
        self._loads = [(0, index) for index in range(layout.workers)]  # heap; old entries stay
        self._intake = intake_of(layout.max_policy_age, layout.groups_per_step)
        self._num_free = layout.num_slots
        self._pace = Pace()
        self._version = 0  # of the learner
        self._held = 0  # by the engines
        self._is_synced = True  # they are the same
        self._waits_for_sync = False  # the end of the next step
        self._step = 0
        self._num_left = layout.groups_per_step
        self._is_learning = False
        self._scorers_free_at = 0.0
        self._learner_busy_s = 0.0
        self._taken: list[Group] = []
        self._ages: list[list[int]] = []
        self._num_drawn = self._num_used = self._num_dropped = 0

    def forecast(self, steps: int) -> Forecast:
        warm_up = self._layout.max_policy_age + 2
        self._admit()
        self._run_until(warm_up)
        started, learner_s, rollout_s = self._now, self._learner_busy_s, self._rollout_busy_s()
        self._run_until(warm_up + steps)
        elapsed = self._now - started
        ages = [age for step in self._ages[warm_up:] for age in step]
        engine_s = elapsed * len(self._engines)
        return Forecast(
            layout=self._layout,
            step_s=elapsed / steps,
            groups_per_s=steps * self._layout.groups_per_step / elapsed,
            age_mean=fmean(ages),
            age_max=max(ages),
            rollout_idle=max(0.0, 1.0 - (self._rollout_busy_s() - rollout_s) / engine_s),
            learner_idle=max(0.0, 1.0 - (self._learner_busy_s - learner_s) / elapsed),
            num_drawn=self._num_drawn,
            num_used=self._num_used,
            num_dropped=self._num_dropped,
            num_under_way=self._intake.num_under_way + len(self._taken),
        )

    def _run_until(self, step: int) -> None:
        while self._step < step:
            self._now, _, happen = heapq.heappop(self._events)
            happen()

    def _rollout_busy_s(self) -> float:
        for engine in self._engines:
            engine.advance(self._now)
        return sum(engine.busy_s for engine in self._engines)

    def _after(self, delay_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay_s, next(self._serial), happen))

    def _admit(self) -> None:
        """One group per free slot, to the engine with the fewest running groups."""
        begun: set[int] = set()
        for _ in range(self._num_free):
            lengths = self._rng.choice(self._profile.lengths)
            group = Group(sum(lengths), len(lengths), self._held)
            self._num_drawn += 1
            self._intake.draw(group)
            index = self._least_loaded()
            self._engines[index].add(group, lengths, self._now)
            begun.add(index)
        self._num_free = 0
        for index in sorted(begun):
            self._plan(index)

    def _least_loaded(self) -> int:
        while True:
            load, index = heapq.heappop(self._loads)
            if load == self._engines[index].num_groups:
                heapq.heappush(self._loads, (load + 1, index))
                return index

    def _plan(self, index: int) -> None:
        """The next end of a sequence on this engine; a change of its load makes the plan void."""
        engine = self._engines[index]
        engine.plan += 1
        plan, due_s = engine.plan, engine.due_s()
        if due_s is not None:
            self._after(due_s, partial(self._generated, index, plan))

    def _generated(self, index: int, plan: int) -> None:
        engine = self._engines[index]
        if plan != engine.plan:
            return
        for group in engine.finish(self._now):
            heapq.heappush(self._loads, (engine.num_groups, index))
            self._after(self._score_s(), partial(self._scored, group))
        self._plan(index)

    def _score_s(self) -> float:
        """Until the verdicts of a group that has just ended; reward workers grow with engines."""
        begins_at = max(self._now, self._scorers_free_at)
        share = self._profile.workers / self._layout.workers
        self._scorers_free_at = begins_at + self._profile.score_s * share
        return max(self._scorers_free_at - self._now, self._profile.score_latency_s)

    def _scored(self, group: Group) -> None:
        if self._rng.random() < self._profile.drop_fraction:
            self._num_dropped += 1
            self._intake.drop(group)
            self._num_free += 1
            self._admit()
        else:
            self._intake.add(group)
        self._take_in()

    def _take_in(self) -> None:
        if self._is_learning:
            return
        if not (batch := self._intake.take()):
            return
        self._is_learning = True
        self._num_left -= len(batch)
        self._taken += batch
        num_tokens = sum(group.num_tokens for group in batch)
        busy_s = self._profile.learn_s(len(batch), num_tokens, self._layout.world_size)
        busy_s *= self._pace.learn
        self._learner_busy_s += busy_s
        self._after(busy_s, self._learned)

    def _learned(self) -> None:
        if self._num_left:
            self._is_learning = False
            self._take_in()
        elif self._is_synced:
            self._stepped()
        else:
            self._waits_for_sync = True

    def _stepped(self) -> None:
        """The step is committed; its weights go to the engines, which pause for a moment."""
        self._ages.append([self._version - group.drawn_at for group in self._taken])
        self._num_used += len(self._taken)
        self._taken = []
        for engine in self._engines:
            engine.pause(self._now)
        self._pace = self._rng.choice(self._profile.paces)
        self._is_synced = False
        hold_s = self._profile.hold_s
        if hold_s is None or self._layout.max_policy_age == 0:
            hold_s = self._profile.sync_s
        self._after(self._profile.pause_s * self._pace.sync, self._resume)
        self._after(hold_s * self._pace.sync, self._begin)
        self._after(self._profile.sync_s * self._pace.sync, self._synced)

    def _resume(self) -> None:
        for index, engine in enumerate(self._engines):
            engine.resume(self._now)
            self._plan(index)

    def _begin(self) -> None:
        """The learner is free for the next step."""
        self._version += 1
        self._step += 1
        self._is_learning = False
        self._num_left = self._layout.groups_per_step
        self._intake.begin(self._version)
        self._take_in()

    def _synced(self) -> None:
        self._held, self._is_synced = self._version, True
        self._num_free += self._layout.groups_per_step
        self._admit()
        if self._waits_for_sync:
            self._waits_for_sync = False
            self._stepped()
