"""The rollout program `guide`: plain rollouts first, hinted ones for tasks that all of them failed.

A rollout worker cannot know that a group failed: rewards are given later, by reward workers of one
version. So the program is asked twice. The first request has hint level 0 and gives plain rollouts;
the reward worker that scores them keeps them out of the buffer when none passes, and the producer
(`actors.producer`) asks for the same group again at hint level 1, 2, ... until one passes or the
hints end. Each attempt is scored as a whole by one reward version, and at most one attempt of a
group enters the buffer, under the group's own id: slots, leases and the ledger do not know of it.

Invariant: a hinted trajectory carries the context it was sampled from (`context_tokens`) and, where
the hint is stripped, the one without it (`train_context_tokens`), token for token what a plain
rollout of the task sees; evaluation asks for level 0 only. Guide: arXiv 2506.13923.
"""

import re
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from actors.hints import SOURCES, HintSource
from actors.programs import SingleTurn
from actors.rollout import Completion, RolloutIO, RolloutRequest, build_trajectory
from cluster import plugins
from cluster.config import Plugin
from cluster.errors import ConfigError, HintError
from cluster.types import (
    GUIDED,
    Author,
    Message,
    Segment,
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
)

Place = Literal["prompt", "completion"]
Merge = Literal["replace", "fill_wrong"]


class Guide:
    """`hints` is a plug-in `{use, settings}`: dataset, solution, answer, writer or your own.

    `place: prompt` shows the hint in the last user message, by `template` (`{prompt}` and
    `{hint}`), and strips it for training unless `strip` is false; `place: completion` begins the
    completion with it, as tokens without gradient, so nothing has to be stripped. `samples` hinted
    rollouts are drawn, by default as many as plain ones. `merge: replace` puts the hinted group in
    the place of the failed one; `fill_wrong` makes one group of the hinted rollouts that pass and
    the plain ones, which all failed. A hinted completion that matches `reject` leans on what the
    policy will not see, and is left out.
    """

    def __init__(
        self,
        hints: dict[str, Any] | None = None,
        template: str | None = None,
        place: Place = "prompt",
        samples: int | None = None,
        merge: Merge = "replace",
        reject: str = r"(?i)\bhints?\b",
        strip: bool = True,
    ) -> None:
        if place not in get_args(Place):
            raise ConfigError(f"place must be prompt or completion, got {place!r}")
        if merge not in get_args(Merge):
            raise ConfigError(f"merge must be replace or fill_wrong, got {merge!r}")
        if samples is not None and samples < 2:
            raise ConfigError(f"samples must be at least 2, got {samples}")
        plugin = Plugin.model_validate({"use": "dataset"} if hints is None else hints)
        self._source: HintSource = plugins.build(plugin.use, plugin.settings, SOURCES, "hints")
        self._template = self._source.template if template is None else template
        if missing := [m for m in ("{prompt}", "{hint}") if m not in self._template]:
            raise ConfigError(f"template must contain {' and '.join(missing)}")
        self._place: Place = place
        self._samples = samples
        self._reject = re.compile(reject) if reject else None
        self._plain = SingleTurn()
        self.merge: Merge = merge
        self.strips_hint = strip and place == "prompt"

    def num_levels(self, task: Task) -> int:
        """How often a failed task is tried again, each time with a stronger hint."""
        return self._source.num_levels(task)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `ConfigError` when no task has what its hint would be made of."""
        if not any(self.num_levels(task) for task in tasks):
            raise ConfigError(
                f"rollout.program.settings.hints: needs tasks with {self._source.needs}; none of "
                f"the {len(tasks)} in tasks.train has that"
            )

    async def run(self, request: RolloutRequest, io: RolloutIO) -> TrajectoryGroup:
        """Plain rollouts at level 0, else hinted ones. Raises `HintError`."""
        if request.hint_level == 0:
            return await self._plain.run(request, io)
        task = request.task
        hint = await self._source.hint(task, request.hint_level)
        plain = io.render(task.messages)
        context, prefix = plain, io.encode("")
        if self._place == "prompt":
            context = io.render(with_hint(task.messages, self._template, hint))
        else:
            goes_on = getattr(self._source, "is_beginning", False)
            prefix = io.encode(hint if goes_on else hint + "\n")
        room = io.context_length - request.sampling.max_new_tokens
        if len(context) + len(prefix) > room:
            raise HintError(
                f"a prompt with its hint has {len(context) + len(prefix)} tokens; "
                f"rollout.max_new_tokens leaves {room} of policy.context_length"
            )
        completions = await io.generate(
            np.concatenate([context, prefix]), self._samples or request.num_trajectories
        )
        trajectories = [
            self._trajectory(request, i, (plain, context, prefix), completion, io)
            for i, completion in enumerate(completions)
        ]
        return TrajectoryGroup(
            group_id=request.group_id, task=task, trajectories=trajectories, created_at=time.time()
        )

    def _trajectory(
        self,
        request: RolloutRequest,
        index: int,
        contexts: tuple[np.ndarray, np.ndarray, np.ndarray],
        completion: Completion,
        io: RolloutIO,
    ) -> Trajectory:
        plain, context, prefix = contexts
        written = completion.segment.token_ids
        is_rejected = self._reject is not None and self._reject.search(io.decode(written))
        zeros = np.zeros(len(prefix), dtype=np.float32)
        begun = [Segment(token_ids=prefix, logprobs=zeros, author=Author.FORCED)]
        trajectory = build_trajectory(
            request,
            index,
            context,
            [*begun, completion.segment],
            TrajectoryStatus.ERROR if is_rejected else completion.status,
            io.decode(np.concatenate([prefix, written])),
        )
        return msgspec.structs.replace(
            trajectory,
            trajectory_id=f"{request.group_id}/hint{request.hint_level}-{index}",
            arm=GUIDED,
            train_context_tokens=plain if self.strips_hint else None,
        )


def with_hint(messages: Sequence[Message], template: str, hint: str) -> list[Message]:
    """The conversation with `hint` in its last message. Neither text is read as a template."""
    *before, last = messages
    parts = re.split(r"(\{prompt\}|\{hint\})", template)
    values = {"{prompt}": last.content, "{hint}": hint}
    content = "".join(values.get(part, part) for part in parts)
    return [*before, msgspec.structs.replace(last, content=content)]
