"""Wire records: what travels between processes and into Redis.

Invariant: every per-token array of a `Trajectory` has the same length L, checked on construction,
so a record that exists is well formed. Arrays are numpy (int32 / float32 / bool) and must not be
written to. Called by every package; `cluster.wire` turns these records into bytes and back.
"""

from enum import StrEnum

import msgspec
import numpy as np

GUIDED = "guided"
PASSED = 0.5  # the least score of the first verifier that counts as a pass


class TrajectoryStatus(StrEnum):
    COMPLETED = "completed"  # ended by the end-of-sequence token or a stop string
    TRUNCATED = "truncated"  # ended by the token limit
    ERROR = "error"  # the rollout program could not finish it


class Author(StrEnum):
    POLICY = "policy"  # sampled from the policy: carries policy gradient
    FORCED = "forced"  # put into the policy's mouth (prefix, hint echo): no gradient
    GIVEN = "given"  # likewise, and to be learned
    TOOL = "tool"
    ENV = "env"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One problem. `task_id` is a content hash, so the same problem has the same id in every
    process.

    `reference` is the gold answer (never rendered into a prompt unless a program asks for it);
    `solution` is a full worked completion for warm start; `hints` go from weakest to strongest;
    `entry` is JSON text that the taskset's own scorer needs.
    """

    task_id: str
    taskset: str
    messages: list[Message]
    reference: str = ""
    solution: str = ""
    hints: list[str] = []
    tags: list[str] = []
    entry: str = ""


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a trajectory were sampled by weights `policy_version`."""

    policy_version: int
    start: int
    end: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One verifier's word on one trajectory. `score` None means it abstained: a third value,
    never 0.

    A verifier fills `score` and what explains it; the rubric stamps `name` (the signal's name in
    the config), `reward_version` and `latency_s`. Example: `Verdict(score=1.0, evidence="42 =
    42")`.
    """

    score: float | None
    name: str = ""
    reward_version: str = ""
    breakdown: dict[str, float] = {}
    step_scores: list[tuple[int, float]] = []  # (token_end, score)
    evidence: str = ""
    error: str = ""
    latency_s: float = 0.0


class Segment(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A run of tokens with one author, as a rollout program produces it. All arrays have shape
    [S].
    """

    token_ids: np.ndarray  # int32
    logprobs: np.ndarray  # float32; zeros where the policy was not the author
    author: Author = Author.POLICY
    version_spans: list[VersionSpan] = []  # relative to this segment


class Trajectory(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One completion of one task. `context_tokens` [C] is the prompt the policy saw; the rest is
    [L].

    `train_context_tokens`, when set, is what the learner conditions on instead (a stripped hint).
    `arm` is how it was made; a program that shows the policy a hint says "guided". Its first
    `num_given` tokens are no policy's and are learned all the same; as they were certain to come,
    their log-probs are 0.
    """

    trajectory_id: str
    group_id: str
    task_id: str
    context_tokens: np.ndarray  # [C] int32
    token_ids: np.ndarray  # [L] int32
    loss_mask: np.ndarray  # [L] bool: True where the policy is the author, or is to become it
    rollout_logprobs: np.ndarray  # [L] float32, temperature-scaled, by the engine that sampled
    version_spans: list[VersionSpan]
    status: TrajectoryStatus
    text: str = ""
    temperature: float = 1.0
    arm: str = "plain"
    train_context_tokens: np.ndarray | None = None
    verdicts: list[Verdict] = []
    reward: float | None = None  # rubric total; None when a weighted verdict abstained
    num_given: int = 0

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        sizes = {"loss_mask": len(self.loss_mask), "rollout_logprobs": len(self.rollout_logprobs)}
        for name, size in sizes.items():
            if size != length:
                raise ValueError(
                    f"{name} must have one value per token: {size} values, {length} tokens"
                )
        if self.version_spans and self.version_spans[-1].end != length:
            raise ValueError(
                f"version spans must cover {length} tokens, end at {self.version_spans[-1].end}"
            )

    @property
    def num_tokens(self) -> int:
        """Completion plus the longer context: a learner may also have to see the one that was
        sampled from.
        """
        stripped = self.train_context_tokens
        context = max(len(self.context_tokens), 0 if stripped is None else len(stripped))
        return context + len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def num_written_tokens(self) -> int:
        """By the policy itself."""
        return self.num_loss_tokens - self.num_given

    @property
    def num_begun(self) -> int:
        """Tokens before the first one that the policy wrote."""
        if self.num_given:
            return self.num_given
        return int(np.argmax(self.loss_mask)) if self.loss_mask.any() else len(self.token_ids)

    @property
    def passed(self) -> bool | None:
        """By the first verifier of the config; None where it abstained or was not asked."""
        score = self.verdicts[0].score if self.verdicts else None
        return None if score is None else score >= PASSED

    @property
    def min_policy_version(self) -> int:
        return min((span.policy_version for span in self.version_spans), default=0)


class Passes(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts of the first verifier on rollouts of groups, the most tokens that one of them was
    begun with, and the fewest that any of the groups asked for.
    """

    num_passed: int = 0
    num_judged: int = 0
    longest_prefix: int = 0
    asked_prefix: int = 0

    @classmethod
    def of(cls, group: "TrajectoryGroup") -> "Passes":
        known = [t.passed for t in group.trajectories if t.passed is not None]
        begun = [t.num_begun for t in group.trajectories if t.arm == GUIDED]
        return cls(
            num_passed=sum(known),
            num_judged=len(known),
            longest_prefix=max(begun, default=0),
            asked_prefix=group.prefix_tokens,
        )

    def __add__(self, other: "Passes") -> "Passes":
        asked = [passes.asked_prefix for passes in (self, other) if passes.asked_prefix]
        return Passes(
            num_passed=self.num_passed + other.num_passed,
            num_judged=self.num_judged + other.num_judged,
            longest_prefix=max(self.longest_prefix, other.longest_prefix),
            asked_prefix=min(asked, default=0),
        )


class TrajectoryGroup(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """All trajectories of one task: the unit of admission, scoring, replay, lease and audit."""

    group_id: str
    task: Task
    trajectories: list[Trajectory]
    reward_versions: dict[str, str] = {}
    priority: float = 0.0
    created_at: float = 0.0
    prefix_tokens: int = 0  # asked for, of those that it has rollouts begun with

    @property
    def min_policy_version(self) -> int:
        """Of the trajectories that a policy has written anything of."""
        sampled = [t.min_policy_version for t in self.trajectories if t.version_spans]
        return min(sampled, default=0)

    @property
    def rewards(self) -> list[float | None]:
        return [t.reward for t in self.trajectories]

    @property
    def is_uniform(self) -> bool:
        """All known rewards are equal: a group-relative advantage would be zero everywhere."""
        known = [r for r in self.rewards if r is not None]
        return len(known) < 2 or max(known) - min(known) < 1e-9

    @property
    def is_trainable(self) -> bool:
        """At least two trajectories have a reward and a token to learn from."""
        return sum(t.reward is not None and t.num_loss_tokens > 0 for t in self.trajectories) >= 2


class GroupHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What scheduling needs to know of a group without reading its payload."""

    group_id: str
    task_id: str
    min_policy_version: int
    num_tokens: list[int]  # per trajectory, context + completion
    num_loss_tokens: int
    reward_versions: dict[str, str]
    priority: float
    passes: Passes = Passes()

    @classmethod
    def of(cls, group: TrajectoryGroup) -> "GroupHeader":
        return cls(
            group_id=group.group_id,
            task_id=group.task.task_id,
            min_policy_version=group.min_policy_version,
            num_tokens=[t.num_tokens for t in group.trajectories],
            num_loss_tokens=sum(t.num_loss_tokens for t in group.trajectories),
            reward_versions=group.reward_versions,
            priority=group.priority,
            passes=Passes.of(group),
        )


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one optimizer step did. `policy_version` is the version of the weights after it."""

    step: int
    policy_version: int
    metrics: dict[str, float]


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `ledger.jsonl`: which groups moved the weights at this step."""

    step: int
    policy_version: int
    group_ids: list[str]
    policy_versions: list[int]  # per group: the minimum version it was sampled with
    reward_versions: dict[str, list[str]]  # signal -> versions seen in this step
    num_loss_tokens: int
    skipped: list[str] = []  # dropped instead: no gradient of them was finite
