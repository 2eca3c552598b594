"""A typed client of the admin API; for queries use the official `openai` client.

Invariant: every method is one request of the API document (`/openapi.json`), and a refusal becomes
an `AdminError` with the server's message. Example:

    with AdminClient("http://127.0.0.1:8000", key) as admin:
        admin.start_canary(7, share=0.1)
        print(admin.release().canary)
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from cluster.errors import HoneError
from cluster.replay_records import BufferStats
from cluster.run_dir import Event, Sample
from cluster.status import RunStatus
from serve.api_types import Events, Metrics, Release, Runs, Samples, Versions
from serve.release import ReleaseState
from serve.replay_queries import GroupFacts, Why
from serve.reward_changes import Buffered, Change, Listing, Shadow, Trial

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


class AdminClient:
    """One connection to an endpoint, with a key of scope `admin`."""

    def __init__(self, url: str, key: str, timeout_s: float = 300.0) -> None:
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
        return self._call(Metrics, "GET", path, params={"after": after}).rows

    def events(self, run: str) -> list[Event]:
        return self._call(Events, "GET", f"/admin/runs/{run}/events").events

    def samples(self, run: str, step: int) -> list[Sample]:
        path = f"/admin/runs/{run}/samples"
        return self._call(Samples, "GET", path, params={"step": step}).samples

    def versions(self) -> Versions:
        return self._call(Versions, "GET", "/admin/versions")

    def release(self) -> ReleaseState:
        return self._call(Release, "GET", "/admin/release").state

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

    def rewards(self, run: str) -> Listing:
        """Rubric versions of `run`, the live one, and how the shadow compares with it."""
        return self._call(Listing, "GET", f"/admin/runs/{run}/rewards")

    def try_rewards(self, run: str, changes: Sequence[str] = (), groups: int = 16) -> Trial:
        """Score stored groups with a candidate; `changes` as for `hone rewards try`."""
        return self._rewards(Trial, run, action="try", changes=[*changes], groups=groups)

    def shadow_rewards(self, run: str, changes: Sequence[str] = ()) -> Shadow:
        return self._rewards(Shadow, run, action="shadow", changes=[*changes])

    def stop_shadow(self, run: str) -> Shadow:
        return self._rewards(Shadow, run, action="stop_shadow")

    def promote_rewards(self, run: str, buffered: Buffered = "keep") -> Change:
        """Make the shadow the live rubric."""
        return self._rewards(Change, run, action="promote", buffered=buffered)

    def roll_back_rewards(self, run: str, buffered: Buffered = "keep") -> Change:
        return self._rewards(Change, run, action="rollback", buffered=buffered)

    def swap_rewards(
        self, run: str, changes: Sequence[str] = (), buffered: Buffered = "keep"
    ) -> Change:
        """Check a candidate on gold answers and make it live between two groups."""
        return self._rewards(Change, run, action="swap", changes=[*changes], buffered=buffered)

    def replay(self, run: str) -> BufferStats:
        """Counts of the replay buffer of a living run."""
        return self._call(BufferStats, "GET", f"/admin/runs/{run}/replay")

    def replay_group(self, run: str, group_id: str) -> GroupFacts:
        return self._call(GroupFacts, "GET", f"/admin/runs/{run}/replay/groups/{group_id}")

    def why(self, run: str, step: int) -> Why:
        """What moved the weights at `step`."""
        return self._call(Why, "GET", f"/admin/runs/{run}/replay/steps/{step}")

    def _rewards(self, kind: type[T], run: str, **action: Any) -> T:
        return self._call(kind, "POST", f"/admin/runs/{run}/rewards", json=action)

    def _release(self, **action: Any) -> ReleaseState:
        return self._call(Release, "POST", "/admin/release", json=action).state

    def _call(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        answer = self._http.request(method, path, **options)
        if answer.status_code != 200:
            error: dict[str, Any] = answer.json().get("error", {})
            code, message = str(error.get("code")), str(error.get("message"))
            raise AdminError(answer.status_code, code, message)
        return msgspec.json.decode(answer.content, type=kind)
