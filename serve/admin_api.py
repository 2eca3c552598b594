"""The admin routes: runs, status, curves, samples, versions and release actions.

Invariant: a route reads run directories that lie beside the served one and nothing else, and every
change of the release goes through `ReleaseControl.change`. Looking needs the scope `view`, changing
`admin`. The same routes feed the page and `serve.client`; `serve.run_api` adds those into a living
run.
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from cluster import status as run_status
from cluster.run_dir import RunDir
from serve import page, run_api
from serve.admission import Admission
from serve.api_document import answers
from serve.api_errors import ApiError
from serve.api_types import EngineState, Events, Metrics, Release, Runs, Samples, Versions
from serve.service import PolicyService

MAX_ROWS = 1000
From = Annotated[int, Query(ge=0, le=2**53)]


class ReleaseAction(BaseModel):
    """One change of what `policy` means."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["canary", "promote", "rollback", "follow"]
    version: Annotated[int | None, Field(ge=0, le=10**12)] = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.1


def attach(
    app: FastAPI, service: PolicyService, admission: Admission, errors: dict[int | str, Any]
) -> None:
    """Add the admin routes and the page to `app`."""
    runs_dir = service.home.path.parent
    whole_page = page.response()

    def opened(request: Request, run: str, scope: Literal["view", "admin"] = "view") -> RunDir:
        admission.identify(request, scope)
        return find_run(runs_dir, run)

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return whole_page

    @app.get("/admin/runs", responses=errors | answers(Runs), summary="Runs beside the served one")
    async def list_runs(request: Request) -> JSONResponse:
        admission.identify(request, "view")
        names = sorted({p.parent.resolve().name for p in runs_dir.glob("*/config.yaml")})
        return _json(Runs(names, service.home.name))

    @app.get(
        "/admin/runs/{run}/status",
        responses=errors | answers(run_status.RunStatus),
        summary="The state `hone status` shows",
    )
    async def status(request: Request, run: str) -> JSONResponse:
        state = run_status.read(opened(request, run).path)
        if state is None:
            raise ApiError(404, f"run {run!r} has not reported yet", code="no_status")
        return _json(state)

    @app.get(
        "/admin/runs/{run}/metrics",
        responses=errors | answers(Metrics),
        summary="Rows of metrics.jsonl",
    )
    async def metrics(request: Request, run: str, after: From = 0) -> JSONResponse:
        found = opened(request, run)
        rows = [r for r in await asyncio.to_thread(found.read_metrics) if r["step"] >= after]
        return _json(Metrics(rows[-MAX_ROWS:]))

    @app.get(
        "/admin/runs/{run}/events",
        responses=errors | answers(Events),
        summary="Last lines of events.jsonl",
    )
    async def events(request: Request, run: str) -> JSONResponse:
        rows = await asyncio.to_thread(opened(request, run).read_events)
        return _json(Events(rows[-MAX_ROWS:]))

    @app.get(
        "/admin/runs/{run}/samples",
        responses=errors | answers(Samples),
        summary="Trajectories of one step",
    )
    async def samples(request: Request, run: str, step: From) -> JSONResponse:
        rows = await asyncio.to_thread(opened(request, run).read_samples)
        steps = sorted({row.step for row in rows})
        return _json(Samples(steps, [row for row in rows if row.step == step]))

    @app.get(
        "/admin/versions",
        responses=errors | answers(Versions),
        summary="Loadable versions and what is loaded",
    )
    async def versions(request: Request) -> JSONResponse:
        admission.identify(request, "view")
        engines = [
            EngineState(slot.policy_version, slot.num_running, slot.pause_s)
            for slot in service.pool.slots
        ]
        return _json(Versions(service.library.versions(), engines))

    @app.get(
        "/admin/release",
        responses=errors | answers(Release),
        summary="What `policy` means now",
    )
    async def release(request: Request) -> JSONResponse:
        admission.identify(request, "view")
        return _json(Release(service.release.state, service.control.problem))

    @app.post(
        "/admin/release",
        responses=errors | answers(Release),
        summary="Canary, promote, roll back or follow",
    )
    async def change(request: Request, action: ReleaseAction) -> JSONResponse:
        key = admission.identify(request, "admin")
        await service.control.change(action.action, action.version, action.share, key.name)
        return _json(Release(service.release.state, service.control.problem))

    run_api.attach(app, opened, errors)


def find_run(parent: Path, run: str) -> RunDir:
    """The run of this plain name under `parent`; a path is no name, and 404 answers the rest."""
    if run not in {path.parent.name for path in parent.glob("*/config.yaml")}:
        raise ApiError(404, f"no run {run[:80]!r}", code="run_not_found")
    return RunDir((parent / run).resolve())


def _json(value: object) -> JSONResponse:
    return JSONResponse(msgspec.to_builtins(value))
