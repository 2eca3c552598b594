"""The one configuration of a run: a pydantic model per section, one section per consumer.

Invariant: a `Config` that exists is complete and consistent; no other module repeats a default.
From YAML and `section.key=value` overrides (`cluster.config_file`); frozen, no unknown keys.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Int, Field(gt=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]


class Section(BaseModel):
    """Numbers may be given as text, as YAML reads `1e-4`; true and false are no numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


class Plugin(Section):
    """A plug-in by name with its keyword settings."""

    use: str
    settings: dict[str, Any] = {}


class RunSection(Section):
    """Identity and length of the run."""

    name: str = "run"
    dir: str = "runs"
    seed: Int = 0
    steps: Positive = 100
    checkpoint_every: Positive = 50
    keep_checkpoints: Positive = 3
    samples_per_step: Annotated[Int, Field(ge=0)] = 2
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ["tensorboard"]


class PolicyCommon(Section):
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    context_length: Positive = 1024


class TinyPolicy(PolicyCommon):
    """A small Qwen3-style decoder with a tokenizer trained on the task texts, made by the run
    itself.
    """

    type: Literal["tiny"]
    hidden_size: Positive = 192
    num_layers: Positive = 4
    num_heads: Positive = 4
    vocab_size: Positive = 320


class PretrainedPolicy(PolicyCommon):
    """A Hugging Face directory or hub id."""

    type: Literal["pretrained"]
    model: str


class GgufPolicy(PolicyCommon):
    """A GGUF file inside an installed package (no model hub), made dense once and cached."""

    type: Literal["gguf"]
    package: str
    file: str


Policy = Annotated[TinyPolicy | PretrainedPolicy | GgufPolicy, Field(discriminator="type")]


class WarmStartSection(Section):
    """Supervised stage before RL, on `solution` of tasks drawn from `tasks.train`.

    A share `direct_fraction` of the examples shows the bare reference instead, so that RL starts
    from a policy that knows both ways to answer.
    """

    examples: Positive = 4096
    direct_fraction: Annotated[Float, Field(ge=0, le=1)] = 0.0
    steps: Positive = 200
    batch_size: Positive = 64
    lr: PositiveFloat = 1e-3


class TasksSection(Section):
    train: Plugin
    eval: Plugin | None = None
    system_prompt: str = ""
    skip_uniform: bool = True  # do not train on groups whose rewards are all equal


class RolloutSection(Section):
    program: Plugin = Plugin(use="single_turn")
    workers: Positive = 1
    tensor_parallel_size: Positive = 1
    group_size: Annotated[Int, Field(ge=2)] = 8
    groups_per_step: Positive = 16
    max_new_tokens: Positive = 256
    temperature: PositiveFloat = 1.0
    max_policy_age: Annotated[Int, Field(ge=0)] = 1
    kv_cache_gib: PositiveFloat = 1.0  # CPU engines; GPU engines use gpu_memory_fraction
    gpu_memory_fraction: Annotated[Float, Field(gt=0, le=1)] = 0.85
    timeout_s: PositiveFloat = 300.0


class PoolConfig(Section):
    """Ray actors of its own for one verifier; without a pool the reward workers run it themselves.

    `workers` is a number or bounds such as "1..4", between which the pool follows its queue.
    """

    workers: Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9]\d*(\.\.[1-9]\d*)?$")] = "1"
    cpus: Annotated[Float, Field(ge=0)] = 0.0  # of each worker, as are the next three
    gpus: Annotated[Float, Field(ge=0)] = 0.0
    memory_gib: Annotated[Float, Field(ge=0)] = 0.0
    max_in_flight: Positive = 8  # groups; the others wait
    runtime_env: dict[str, Any] = {}  # of Ray: pip, env_vars, working_dir, ...

    @model_validator(mode="after")
    def _has_ordered_bounds(self) -> "PoolConfig":
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(f"workers: bounds must be in order, got {self.workers!r}")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        low, _, high = self.workers.partition("..")
        return int(low), int(high or low)


class VerifierConfig(Plugin):
    """One named signal of the rubric. `weight` 0 makes it a monitor: measured, not rewarded."""

    weight: Float = 1.0
    timeout_s: PositiveFloat = 10.0
    golden: list[dict[str, Any]] = []  # of `completion`, `score` and `reference` or `tests`
    pool: PoolConfig | None = None


class RewardsSection(Section):
    workers: Positive = 1
    verifiers: Annotated[dict[str, VerifierConfig], Field(min_length=1)]


class BufferSection(Section):
    url: str | None = None  # redis://... ; none starts an embedded server for this run
    capacity_groups: Positive = 1024
    lease_s: PositiveFloat = 120.0
    max_deliveries: Positive = 3
    policy: dict[str, Any] = {"use": "fifo"}  # use, settings; see cluster.replay_policy


class LearnerSection(Section):
    world_size: Positive = 1
    lr: PositiveFloat = 1e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    microbatch_tokens: Positive = 4096
    minibatches: Positive = 1  # optimizer updates per step, each on its share of the groups
    epochs: Positive = 1  # passes of a step over its groups, all their updates in each
    lora: dict[str, Any] | None = None  # rank, alpha, targets of adapters; see learners.lora
    # Activations are computed again where they are needed, the others wait in host memory.
    save_memory: list[Literal["activations", "policy", "reference", "critic"]] = []
    timeout_s: PositiveFloat = 600.0


class ObjectiveSection(Section):
    """Credit turns rewards into per-token advantages; losses add up with their weights."""

    credit: Plugin = Plugin(use="grpo")
    losses: Annotated[dict[str, "LossConfig"], Field(min_length=1)] = Field(
        default_factory=lambda: {"policy": LossConfig(use="policy_gradient")}
    )


class LossConfig(Plugin):
    weight: Float = 1.0


class CriticSection(Section):
    """The value network that credits such as `gae` need; optimised on its own."""

    lr: PositiveFloat = 1e-5
    pretrain_steps: Annotated[Int, Field(ge=0)] = 0  # first steps, in which the policy stays
    epochs: Positive = 1  # passes over the rollouts of an update, the policy takes one
    loss: Plugin = Plugin(use="value")


class SyncSection(Section):
    transport: Literal["file", "broadcast", "shared"] = "file"  # see docs/gpu.md
    probe_bound: PositiveFloat = 0.05  # mean |engine - learner| log-prob that quarantines an engine
    timeout_s: PositiveFloat = 300.0


class EvalSection(Section):
    every: Positive = 20
    tasks: Positive = 64
    samples_per_task: Positive = 4
    temperature: PositiveFloat = 1.0


class ResourcesSection(Section):
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    cpus: Positive | None = None  # for a local Ray; none takes all cores
    start_timeout_s: PositiveFloat = 300.0
    layout: Literal["split", "colocated", "alternating"] = "split"  # of GPUs: see docs/gpu.md
    engine_gpu_share: Annotated[Float, Field(gt=0, le=1)] = 1.0  # of each GPU of an engine
    labels: dict[Literal["learner", "rollout", "reward"], dict[str, str]] = {}  # of Ray nodes


class Config(Section):
    """All sections. `max_policy_age` 0 is strictly on-policy; k lets rollouts run k steps ahead."""

    run: RunSection = RunSection()
    policy: Policy
    warm_start: WarmStartSection | None = None
    tasks: TasksSection
    rollout: RolloutSection = RolloutSection()
    rewards: RewardsSection
    buffer: BufferSection = BufferSection()
    learner: LearnerSection = LearnerSection()
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    critic: CriticSection | None = None
    sync: SyncSection = SyncSection()
    eval: EvalSection = EvalSection()
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _is_consistent(self) -> "Config":
        if self.rollout.max_new_tokens >= self.policy.context_length:
            raise ValueError(
                f"rollout.max_new_tokens ({self.rollout.max_new_tokens}) must be below "
                f"policy.context_length ({self.policy.context_length}): no room for a prompt"
            )
        if self.learner.microbatch_tokens < self.policy.context_length:
            raise ValueError(
                f"learner.microbatch_tokens ({self.learner.microbatch_tokens}) must be at least "
                f"policy.context_length ({self.policy.context_length}): one trajectory must fit"
            )
        if self.learner.minibatches > self.rollout.groups_per_step:
            raise ValueError(
                f"learner.minibatches ({self.learner.minibatches}) must be at most "
                f"rollout.groups_per_step ({self.rollout.groups_per_step}): each needs a group"
            )
        if self.critic is not None and self.critic.pretrain_steps >= self.run.steps:
            raise ValueError(
                f"critic.pretrain_steps ({self.critic.pretrain_steps}) must be below run.steps "
                f"({self.run.steps}), or the policy would never move"
            )
        share = self.resources.engine_gpu_share
        if share < 1 and self.rollout.tensor_parallel_size > 1:
            raise ValueError(
                f"resources.engine_gpu_share ({share:g}): must be 1, only an engine of one GPU can "
                f"share it (rollout.tensor_parallel_size {self.rollout.tensor_parallel_size})"
            )
        if self.resources.layout != "split" and share >= 0.5:
            raise ValueError(
                f"resources.engine_gpu_share ({share:g}) must be below 0.5 with resources.layout "
                f"{self.resources.layout}: the learner rank beside it gets the rest, and needs more"
            )
        if self.resources.layout == "alternating" and self.rollout.max_policy_age > 0:
            raise ValueError(
                "resources.layout alternating needs rollout.max_policy_age 0: no engine runs ahead"
            )
        if self.sync.transport == "broadcast" and share < 1:  # as it is in a layout that shares
            raise ValueError(
                "sync.transport broadcast needs resources.layout split and "
                f"resources.engine_gpu_share 1 (got {share:g}): NCCL wants a GPU for each member"
            )
        needed = (self.rollout.max_policy_age + 2) * self.rollout.groups_per_step
        if self.buffer.capacity_groups < needed:
            raise ValueError(
                f"buffer.capacity_groups ({self.buffer.capacity_groups}) must be at least {needed} "
                "= (rollout.max_policy_age + 2) * rollout.groups_per_step, or the run would stall"
            )
        return self

    @property
    def max_groups_in_flight(self) -> int:
        """Slots of the staleness policy: capacity is the bound on policy age."""
        return (self.rollout.max_policy_age + 1) * self.rollout.groups_per_step


Config.model_rebuild()
