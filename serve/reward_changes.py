"""Changes of a living run's rubric, as `hone rewards`, the admin API and the page ask for them.

Invariant: a candidate is the live rubric with edits, read from the run itself; a refusal raises
with the run's reason and has changed nothing. All calls block, within their deadline.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from cluster import reward_state
from cluster.config_file import apply_override
from cluster.control import ControlClient
from cluster.errors import ConfigError
from cluster.reward_state import RewardState
from cluster.run_dir import RunDir

Buffered = Literal["keep", "rescore", "drop"]  # groups in the buffer scored by an older version
Verifiers = dict[str, dict[str, Any]]
Report = dict[str, int | float | str]  # `actors.reward_candidate.Comparison`
Edit = str | Mapping[str, Any]  # `SIGNAL.KEY=VALUE`, or whole verifiers that replace all
LIST_S = 10.0
CHANGE_S = 240.0


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """All rubric versions, the live one in `state.active`; `report` compares the shadow with it."""

    state: RewardState
    shadow: str = ""
    report: Report | None = None
    is_alive: bool = True


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate against stored groups. `gold` is empty when it pays gold answers in full."""

    hash: str
    gold: str
    verifiers: Verifiers
    report: Report


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a shadow: its version when it was started, its report when it was stopped."""

    version: str = ""
    warnings: list[str] = []
    report: Report | None = None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A version that went live; `buffered` groups were treated as `choice` says."""

    before: str = msgspec.field(name="from")
    to: str
    buffered: int
    choice: str
    warnings: list[str] = []


def listing(run: RunDir) -> Listing:
    """From the run, or from its files when it does not train."""
    try:
        return msgspec.convert(ControlClient(run).ask("rewards.list", {}, LIST_S), Listing)
    except ConfigError:
        state = reward_state.load(run.path)
        if state is None:
            raise
        return Listing(state=state, is_alive=False)


def try_out(
    run: RunDir, edits: Sequence[Edit] = (), groups: int = 16, deadline_s: float = CHANGE_S
) -> Trial:
    """Score stored groups with a candidate; nothing in the run changes."""
    client = ControlClient(run)
    asked = {"verifiers": _candidate(client, edits), "groups": groups}
    return msgspec.convert(client.ask("rewards.try", asked, deadline_s), Trial)


def start_shadow(run: RunDir, edits: Sequence[Edit] = (), deadline_s: float = CHANGE_S) -> Shadow:
    """Let a candidate score live groups beside the live rubric, without influence."""
    client = ControlClient(run)
    asked = {"verifiers": _candidate(client, edits)}
    return msgspec.convert(client.ask("rewards.shadow", asked, deadline_s), Shadow)


def stop_shadow(run: RunDir, deadline_s: float = CHANGE_S) -> Shadow:
    answer = ControlClient(run).ask("rewards.shadow", {"stop": True}, deadline_s)
    return msgspec.convert(answer, Shadow)


def promote(run: RunDir, buffered: str = "keep", deadline_s: float = CHANGE_S) -> Change:
    """Make the shadow the live rubric."""
    answer = ControlClient(run).ask("rewards.promote", {"buffered": buffered}, deadline_s)
    return msgspec.convert(answer, Change)


def roll_back(run: RunDir, buffered: str = "keep", deadline_s: float = CHANGE_S) -> Change:
    """Make the version before the live one live again."""
    answer = ControlClient(run).ask("rewards.rollback", {"buffered": buffered}, deadline_s)
    return msgspec.convert(answer, Change)


def swap(
    run: RunDir, edits: Sequence[Edit] = (), buffered: str = "keep", deadline_s: float = CHANGE_S
) -> Change:
    """Start a candidate, check it on gold answers, and make it live between two groups."""
    client = ControlClient(run)
    asked = {"verifiers": _candidate(client, edits), "buffered": buffered}
    return msgspec.convert(client.ask("rewards.swap", asked, deadline_s), Change)


def words(verifiers: Verifiers) -> str:
    """`correct: task x 1 extract=last_line; format: regex x 0.1`."""

    def one(name: str, verifier: dict[str, Any]) -> str:
        chosen: dict[str, Any] = verifier.get("settings") or {}
        settings = "".join(f" {key}={value}" for key, value in chosen.items())
        return f"{name}: {verifier['use']} x {verifier.get('weight', 1.0):g}{settings}"

    return "; ".join(one(name, verifier) for name, verifier in verifiers.items())


def _candidate(client: ControlClient, edits: Sequence[Edit]) -> Verifiers:
    """The live verifiers with the edits applied; without edits, the same settings again (their
    code may have changed).
    """
    state = msgspec.convert(client.ask("rewards.list", {}, LIST_S), Listing).state
    live = state.get(state.active)
    assert live is not None
    verifiers: dict[str, Any] = msgspec.to_builtins(live.verifiers)
    for edit in edits:
        if isinstance(edit, str):
            apply_override(verifiers, edit)
        else:
            verifiers = dict(edit)
    return {name: value for name, value in verifiers.items() if value is not None}
