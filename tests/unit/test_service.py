"""Which engine a model name leads to, what the answer calls it, and who is blamed; fake engines."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from actors.openai_reply import Trace
from actors.placement import EngineSettings
from cluster import published, status
from cluster.run_dir import RunDir
from cluster.status import RunStatus
from serve import engine_pool
from serve.admission import Limits
from serve.api_errors import ApiError
from serve.endpoint_settings import EndpointSettings
from serve.guards import GuardSettings
from serve.service import PolicyService
from tests.fake_engine import FakeEngine, Starter, until


@pytest.fixture(autouse=True)
def _check_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain files stand for weights: those that say so are bad."""
    monkeypatch.setattr(
        engine_pool, "check_file", lambda path, _policy_dir: path.read_text().partition("bad")[1]
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs", "demo", "{}", exist_ok=False)
    run.share_weights()
    return run


def publish(run: RunDir, version: int, text: str = "good") -> None:
    path = run.weights / f"policy_{version:08d}.safetensors"
    path.write_text(text)
    published.announce(run.weights, version, path)


def settings_of(run: RunDir) -> EndpointSettings:
    return EndpointSettings(
        home=run.path, has_run=True, policy_dir=run.policy, engine=cast(EngineSettings, None),
        keys=run.path / "keys.json", is_open=True, limits=Limits(), guards=GuardSettings(),
        max_engines=2,
    )  # fmt: skip


class Service:
    """A service on fake engines, and how it is asked."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.starter = Starter()
        self.inner = PolicyService(settings, self.starter.start)

    @property
    def stable(self) -> FakeEngine:
        return self.starter.engines[0]

    async def ask(self, model: str, **fields: bool) -> dict[str, Any]:
        body = {"model": model, **fields}
        answer = await self.inner.answer("completion", body, Trace())
        await answer.stack.aclose()
        return answer.reply.body

    def problems(self, version: int) -> list[bool]:
        """Of each outcome that the guards were told, whether it is a failure."""
        recent = self.inner.control.outcomes._recent.get(version, ())
        return [outcome.is_error for outcome in recent]


@pytest_asyncio.fixture
async def service(run: RunDir) -> AsyncIterator[Service]:
    publish(run, 1)
    service = Service(settings_of(run))
    await service.inner.open()
    yield service
    await service.inner.close()


async def test_an_answer_is_named_after_a_version_that_sampled_it(
    run: RunDir, service: Service
) -> None:
    """It waited in the engine while the weights changed."""
    service.stable.goes_on.clear()
    waiting = asyncio.create_task(service.ask("policy"))
    await until(lambda: service.inner.pool.stable.num_running == 1)
    service.stable.policy_version = 2
    service.stable.goes_on.set()
    body = await waiting
    assert body["model"] == "policy@2"
    assert [span["policy_version"] for span in body["policy_versions"]] == [2]
    assert (service.problems(1), service.problems(2)) == ([], [False])


async def test_a_newest_file_that_is_bad_is_refused_beside_a_fixed_version(
    run: RunDir, service: Service
) -> None:
    release = service.inner.release
    release.promote(1, seen=release.state, author="test")
    publish(run, 2, "bad")
    assert (await service.ask("policy@latest"))["model"] == "policy@1"
    assert release.state.refused == [2]
    [event] = [e for e in run.read_events() if e.kind == "release_refused"]
    assert "refused: bad" in str(event.fields["reason"])
    publish(run, 3)
    assert (await service.ask("policy@latest"))["model"] == "policy@3"


async def test_an_engine_that_does_not_start_is_not_the_fault_of_the_newest_version(
    run: RunDir, service: Service
) -> None:
    release = service.inner.release
    release.promote(1, seen=release.state, author="test")
    publish(run, 2)
    service.starter.problem = "no memory"
    with pytest.raises(ApiError, match="no memory") as refused:
        await service.ask("policy@latest")
    assert (refused.value.status, release.state.refused) == (503, [])


async def test_what_is_published_while_the_engine_of_the_newest_starts_needs_no_other_one(
    run: RunDir, service: Service
) -> None:
    release = service.inner.release
    release.promote(1, seen=release.state, author="test")
    service.starter.goes_on.clear()
    publish(run, 2)
    first = asyncio.create_task(service.ask("policy@latest"))
    await until(lambda: service.starter.num_begun == 2)
    publish(run, 3)
    later = [asyncio.create_task(service.ask("policy@latest")) for _ in range(3)]
    await asyncio.sleep(0)
    service.starter.goes_on.set()
    assert (await first)["model"] in ("policy@2", "policy@3")
    assert [(await task)["model"] for task in later] == ["policy@3"] * 3
    assert service.starter.num_begun == 2


async def test_a_pin_shares_stable_where_nothing_moves_it(run: RunDir, service: Service) -> None:
    def report(phase: str) -> None:
        status.write(run.path, RunStatus(run="demo", phase=phase))

    report("finished")
    await service.ask("policy@1")
    assert service.starter.num_begun == 1
    report("training")
    await service.ask("policy@1")
    assert service.starter.num_begun == 2, "the run may move stable any time"


async def test_a_pin_of_a_model_directory_needs_no_second_engine(run: RunDir) -> None:
    service = Service(replace(settings_of(run), has_run=False, max_engines=1))
    await service.inner.open()
    assert (await service.ask("policy@0"))["model"] == "policy@0"
    assert service.starter.num_begun == 1
    with pytest.raises(ApiError, match="no such version"):
        await service.ask("policy@1")
    await service.inner.close()


@pytest.mark.parametrize("finishes_others", [True, False])
async def test_a_late_answer_is_a_failure_only_of_an_engine_that_finishes_nothing(
    run: RunDir, finishes_others: bool
) -> None:
    publish(run, 1)
    service = Service(replace(settings_of(run), limits=Limits(deadline_s=0.3)))
    await service.inner.open()
    service.stable.goes_on.clear()
    late = asyncio.create_task(service.ask("policy"))
    await until(lambda: service.inner.pool.stable.num_running == 1)
    if finishes_others:
        await service.ask("policy", quick=True)
    with pytest.raises(ApiError) as refused:
        await late
    assert refused.value.status == 504
    assert service.problems(1) == ([False] if finishes_others else [True])
    await service.inner.close()
