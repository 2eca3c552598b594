"""Whether Ray Serve of a cluster has a place for the endpoint, and what is ended; it is faked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ConfigError, StageError
from serve import endpoint
from serve.endpoint_settings import Door

SETTINGS: Any = SimpleNamespace(home=Path("runs/demo"))
HELD = {"host": "127.0.0.1", "port": 8000, "ssl_keyfile": None, "ssl_certfile": None}


class FakeServe:
    """Ray Serve of a cluster: `held` is None until it was started."""

    def __init__(self, held: dict[str, Any] | None, routes: dict[str, str | None]) -> None:
        self.held, self.routes = held, routes
        self.is_over = False
        self.problem: Exception | None = None

    def client(self, *, raise_if_no_controller_running: bool) -> Any:
        if self.held is None:
            return None
        applications = {name: {"route_prefix": route} for name, route in self.routes.items()}
        return SimpleNamespace(
            http_config=SimpleNamespace(**self.held),
            get_serve_details=lambda: {"applications": applications},
        )

    def start(self, *, proxy_location: str, http_options: Any) -> None:
        if self.problem is not None:
            raise self.problem
        self.held = self.held or HELD

    def status(self) -> Any:
        return SimpleNamespace(applications=self.routes)

    def shutdown(self) -> None:
        self.is_over = True


@contextmanager
def serving(
    monkeypatch: pytest.MonkeyPatch, fake: FakeServe, door: Door | None = None
) -> Iterator[None]:
    monkeypatch.setattr(endpoint, "ray_serve", fake)
    monkeypatch.setattr(endpoint, "_get_global_client", fake.client)
    with endpoint._ray_serve(SETTINGS, door or Door(), "auto"):
        yield


@pytest.mark.parametrize(
    ("routes", "door", "said"),
    [
        ({}, Door(port=9000), "listens at 127.0.0.1:8000"),
        ({}, Door(host="0.0.0.0"), "listens at 127.0.0.1:8000"),
        ({}, Door(tls_key="key", tls_cert="cert"), "no TLS"),
        ({"other": "/"}, Door(), "'other' of the Ray cluster answers at '/'"),
        ({endpoint.APP: "/"}, Door(), "runs the application 'hone-policy' already"),
    ],
)
def test_what_another_holds_is_refused_and_stays(
    monkeypatch: pytest.MonkeyPatch, routes: dict[str, str | None], door: Door, said: str
) -> None:
    fake = FakeServe(HELD, routes)
    with pytest.raises(ConfigError, match=said), serving(monkeypatch, fake, door):
        pytest.fail("there is no place")
    assert not fake.is_over


@pytest.mark.parametrize(
    ("held", "routes", "is_over"),
    [(None, {}, True), (None, {"other": "/x"}, False), (HELD, {"other": None}, False)],
)
def test_what_was_started_ends_unless_another_uses_it(
    monkeypatch: pytest.MonkeyPatch,
    held: dict[str, Any] | None,
    routes: dict[str, str | None],
    is_over: bool,
) -> None:
    fake = FakeServe(held, routes)
    with serving(monkeypatch, fake):
        assert not fake.is_over
    assert fake.is_over == is_over


def test_proxies_that_do_not_come_up_are_a_named_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe(None, {})
    fake.problem = TimeoutError("HTTP proxies not available after 60s.")
    with pytest.raises(StageError, match="proxies not available"), serving(monkeypatch, fake):
        pytest.fail("it did not start")
    assert fake.is_over
