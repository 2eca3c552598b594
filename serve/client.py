"""A typed client of the admin API; for queries use the official `openai` client.

Invariant: every method is one request of the API document (`/openapi.json`), and a refusal becomes
an `AdminError` with the server's message. Example:

    with AdminClient("http://127.0.0.1:8000", key) as admin:
        admin.start_canary(7, share=0.1)
        print(admin.release().canary)
"""

from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from cluster.errors import HoneError
from cluster.run_dir import Event, Sample
from cluster.status import RunStatus
from serve.release import ReleaseState
from serve.weight_library import Version

T = TypeVar("T")


class AdminError(HoneError):
    """The endpoint refused; `status` is the HTTP status, `code` the error's code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"


class EngineState(msgspec.Struct, frozen=True):
    """One engine of a replica. `pause_s` is what its last weight update took."""

    policy_version: int | None
    running: int
    pause_s: float


class Versions(msgspec.Struct, frozen=True):
    versions: list[Version]
    engines: list[EngineState]


class Runs(msgspec.Struct, frozen=True):
    runs: list[str]
    served: str


class _Release(msgspec.Struct, frozen=True):
    state: ReleaseState
    problem: str


class _Metrics(msgspec.Struct, frozen=True):
    rows: list[dict[str, float]]


class _Events(msgspec.Struct, frozen=True):
    events: list[Event]


class _Samples(msgspec.Struct, frozen=True):
    steps: list[int]
    samples: list[Sample]


class AdminClient:
    """One connection to an endpoint, with a key of scope `admin`."""

    def __init__(self, url: str, key: str, timeout_s: float = 120.0) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def runs(self) -> Runs:
        return self._call(Runs, "GET", "/admin/runs")

    def status(self, run: str) -> RunStatus:
        return self._call(RunStatus, "GET", f"/admin/runs/{run}/status")

    def metrics(self, run: str, after: int = 0) -> list[dict[str, float]]:
        """Rows of steps >= `after`, oldest first."""
        path = f"/admin/runs/{run}/metrics"
        return self._call(_Metrics, "GET", path, params={"after": after}).rows

    def events(self, run: str) -> list[Event]:
        return self._call(_Events, "GET", f"/admin/runs/{run}/events").events

    def samples(self, run: str, step: int) -> list[Sample]:
        path = f"/admin/runs/{run}/samples"
        return self._call(_Samples, "GET", path, params={"step": step}).samples

    def versions(self) -> Versions:
        return self._call(Versions, "GET", "/admin/versions")

    def release(self) -> ReleaseState:
        return self._call(_Release, "GET", "/admin/release").state

    def start_canary(self, version: int, share: float) -> ReleaseState:
        return self._release(action="canary", version=version, share=share)

    def promote(self, version: int | None = None) -> ReleaseState:
        """Make `version` (None: the canary) what `policy` means."""
        return self._release(action="promote", version=version)

    def roll_back(self, version: int | None = None) -> ReleaseState:
        """End the canary, or go back to `version` (None: the stable version before)."""
        return self._release(action="rollback", version=version)

    def follow(self) -> ReleaseState:
        return self._release(action="follow")

    def _release(self, **action: Any) -> ReleaseState:
        return self._call(_Release, "POST", "/admin/release", json=action).state

    def _call(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        answer = self._http.request(method, path, **options)
        if answer.status_code != 200:
            error: dict[str, Any] = answer.json().get("error", {})
            code, message = str(error.get("code")), str(error.get("message"))
            raise AdminError(answer.status_code, code, message)
        return msgspec.json.decode(answer.content, type=kind)
