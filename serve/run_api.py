"""The admin routes into a living run: its rewards and its replay buffer.

Invariant: the work is that of `hone rewards` and `hone replay` (`serve.reward_changes`,
`serve.replay_queries`), done in threads of its own, so a slow run holds up neither queries nor
weights. Looking needs the scope `view`, changing `admin`.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import BufferUnavailableError, ConfigError, DeadlineError, HoneError
from cluster.run_dir import RunDir
from serve import replay_queries, reward_changes
from serve.api_document import answers
from serve.api_errors import ApiError

THREADS = 4
Answer = TypeVar("Answer")
Opened = Callable[[Request, str, Literal["view", "admin"]], RunDir]


class RewardAction(BaseModel):
    """One request to the rewards of a run. `changes` are edits of the live rubric as `hone
    rewards` takes them; `verifiers` replaces it before they apply.
    """

    model_config = ConfigDict(extra="forbid")

    action: Literal["try", "shadow", "stop_shadow", "promote", "rollback", "swap"]
    changes: Annotated[list[Annotated[str, Field(max_length=2000)]], Field(max_length=64)] = []
    verifiers: dict[str, Any] | None = None
    buffered: reward_changes.Buffered = "keep"
    groups: Annotated[int, Field(ge=1, le=256)] = 16

    def carry_out(self, run: RunDir) -> msgspec.Struct:
        edits: list[reward_changes.Edit] = [] if self.verifiers is None else [self.verifiers]
        edits += self.changes
        match self.action:
            case "try":
                return reward_changes.try_out(run, edits, self.groups)
            case "shadow":
                return reward_changes.start_shadow(run, edits)
            case "stop_shadow":
                return reward_changes.stop_shadow(run)
            case "promote":
                return reward_changes.promote(run, self.buffered)
            case "rollback":
                return reward_changes.roll_back(run, self.buffered)
            case "swap":
                return reward_changes.swap(run, edits, self.buffered)


def attach(app: FastAPI, opened: Opened, errors: dict[int | str, Any]) -> None:
    """Add the routes to `app`; `opened` checks the key and finds the run."""
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="admin")

    async def ask(call: Callable[[], msgspec.Struct], refusal: int) -> JSONResponse:
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(threads, call)
        except DeadlineError as error:
            raise ApiError(504, error.reason, code="deadline_exceeded") from error
        except BufferUnavailableError as error:
            raise ApiError(503, str(error), code="buffer_unavailable", retry_after_s=5) from error
        except HoneError as error:
            code = "not_found" if refusal == 404 else "refused"
            status = 400 if refusal == 409 and _is_bad_edit(error) else refusal
            raise ApiError(status, str(error), code=code) from error
        return JSONResponse(msgspec.to_builtins(answer))

    async def look(
        request: Request, run: str, query: Callable[..., msgspec.Struct], *asked: str | int
    ) -> JSONResponse:
        return await ask(partial(query, opened(request, run, "view"), *asked), 404)

    @app.get(
        "/admin/runs/{run}/rewards",
        responses=errors | answers(reward_changes.Listing),
        summary="Rubric versions, the live one, and how the shadow compares",
    )
    async def list_rewards(request: Request, run: str) -> JSONResponse:
        return await look(request, run, reward_changes.listing)

    @app.post(
        "/admin/runs/{run}/rewards",
        responses=errors
        | answers(reward_changes.Trial, reward_changes.Shadow, reward_changes.Change),
        summary="Try, shadow, promote, roll back or swap the rubric while the run trains",
    )
    async def change_rewards(request: Request, run: str, action: RewardAction) -> JSONResponse:
        found = opened(request, run, "admin")
        return await ask(partial(action.carry_out, found), 409)

    @app.get(
        "/admin/runs/{run}/replay",
        responses=errors | answers(replay_queries.BufferStats),
        summary="Counts of the replay buffer",
    )
    async def replay_stats(request: Request, run: str) -> JSONResponse:
        return await look(request, run, replay_queries.stats)

    @app.get(
        "/admin/runs/{run}/replay/groups/{group}",
        responses=errors | answers(replay_queries.GroupFacts),
        summary="One group that the buffer holds",
    )
    async def replay_show(
        request: Request, run: str, group: Annotated[str, Path(max_length=200)]
    ) -> JSONResponse:
        return await look(request, run, replay_queries.show, group)

    @app.get(
        "/admin/runs/{run}/replay/steps/{step}",
        responses=errors | answers(replay_queries.Why),
        summary="What moved the weights at a step",
    )
    async def replay_why(
        request: Request, run: str, step: Annotated[int, Path(ge=0, le=2**53)]
    ) -> JSONResponse:
        return await look(request, run, replay_queries.why, step)


def _is_bad_edit(error: HoneError) -> bool:
    return isinstance(error, ConfigError) and "must be training" not in str(error)
