"""The launcher keeps Redis up in short tries, until a run has waited long enough."""

from typing import cast

import pytest

from actors import train
from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import ConfigError, DeadlineError, StageError


class Server:
    """Raises `errors`, one a start, and then is up."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.limits: list[float] = []

    def start(self, deadline_s: float) -> str:
        self.limits.append(deadline_s)
        if self.errors:
            raise self.errors.pop(0)
        return "redis://"


def keep_up(server: Server, away_since: float | None) -> float | None:
    return train._keep_up(cast(EmbeddedRedis, server), away_since)


def test_an_outage_is_counted_from_its_first_try_and_forgotten_when_over() -> None:
    server = Server(DeadlineError("embedded redis", "loads"), ConfigError("still locked"))
    since = keep_up(server, None)
    assert since is not None
    assert keep_up(server, since) == since
    assert keep_up(server, since) is None
    assert server.limits == [train.START_TRY_S] * 3
    assert train.START_TRY_S < train.STOP_DEADLINE_S, "an interrupt is heard in time"


def test_an_outage_without_an_end_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "OUTAGE_S", 0.0)
    with pytest.raises(DeadlineError, match="redis: away for 0 s: embedded redis: loads"):
        keep_up(Server(DeadlineError("embedded redis", "loads")), 0.0)


def test_a_server_that_cannot_load_its_data_is_not_tried_for_ever() -> None:
    with pytest.raises(StageError, match="damaged"):
        keep_up(Server(StageError("embedded redis", "damaged")), None)
