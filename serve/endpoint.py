"""The Ray Serve application of the policy endpoint: replicas, health, and how it is started.

Invariant: the HTTP door binds to loopback unless asked otherwise, and never opens on another
address without keys. In a Ray of our own each replica is its own HTTP server; on a cluster Ray
Serve's proxies listen, and where they listen elsewhere already nothing is started. Stopping takes
the engines, their processes and their weight files with it, and nothing that another endpoint of
the run or another application of the cluster has.
"""

# pyright: basic

import gc
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from actors.connection import join, own_ray
from actors.placement import ALONE_ENV, QUIET_ENV
from cluster import log, ray_token
from cluster.errors import ConfigError, StageError
from cluster.run_dir import RunDir
from serve.endpoint_settings import Door, EndpointSettings, check, url_file
from serve.front_door import FrontDoor, listen
from serve.replica_folder import sweep
from serve.service import PolicyService

APP = "hone-policy"
HEALTH_S = 10.0
MAX_STARTS = 2
# Ray Serve kills a proxy that is not up in 5 s, which a busy two-core machine does not manage.
_PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "55",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}
# What Ray Serve raises where it cannot do what it was asked.
_FAILURES = (RuntimeError, TimeoutError, RayServeException, RayError)
logger = logging.getLogger(__name__)


class PolicyReplica:
    """One replica: a `PolicyService` with the application on top of it.

    `door` None leaves listening to Ray Serve's proxies.
    """

    async def __init__(self, settings: EndpointSettings, door: Door | None) -> None:
        log.setup("endpoint", settings.home)
        self._service = PolicyService(settings)
        self._front = None if door is None else FrontDoor(door)
        await self._service.open()
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection needs to walk through it again
        if self._front is not None:
            await self._front.open(self.__serve_build_asgi_app__())

    def __serve_build_asgi_app__(self) -> Any:
        from serve import http_api

        return http_api.build(self._service)

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if not await self._service.is_healthy():
            raise StageError("endpoint", "an engine is gone")
        if self._front is not None and not self._front.is_open:
            raise StageError("endpoint", "the HTTP server is gone")

    async def __del__(self) -> None:
        if self._front is not None:
            await self._front.close()
        await self._service.close()


@contextmanager
def running(
    settings: EndpointSettings, door: Door, *, replicas: int = 1, address: str = "local"
) -> Generator[str]:
    """The endpoint, answering; yields its URL. `StageError` when no engine came up."""
    check(settings, door)
    is_ours = address == "local"
    if is_ours:
        listen(door, is_shared=False).close()  # taken: say so now, not when the engine is loaded
    run, told = RunDir(settings.home), url_file(settings.home)
    sweep(run)
    try:
        with _cluster(address), _ray_serve(settings, door, address):
            try:
                with _naming_failures(settings):
                    at = door if is_ours else None
                    ray_serve.run(application(settings, replicas, at), name=APP, route_prefix="/")
                told.parent.mkdir(exist_ok=True)
                told.write_text(door.url)
                yield door.url
            finally:
                if not is_ours:
                    with _telling_failures(f"removing {APP}"):
                        ray_serve.delete(APP)
    finally:
        if told.is_file() and told.read_text() == door.url:  # no later endpoint has written it
            told.unlink(missing_ok=True)
        sweep(run)


@contextmanager
def _ray_serve(settings: EndpointSettings, door: Door, address: str) -> Generator[None]:
    """Ray Serve on the cluster, with its proxies at `door` unless the Ray is ours. What was started
    here ends here, once no application is left.
    """
    is_ours, is_new = address == "local", False
    key, certificate = (
        path and str(Path(path).absolute()) for path in (door.tls_key, door.tls_cert)
    )
    asked = HTTPOptions(host=door.host, port=door.port, ssl_keyfile=key, ssl_certfile=certificate)
    try:
        with _naming_failures(settings):
            is_new = not is_ours and not _has_place(address, asked)
            ray_serve.start(
                proxy_location="Disabled" if is_ours else "HeadOnly", http_options=asked
            )
        yield
    finally:
        if is_ours:
            ray_serve.shutdown()
        elif is_new:
            with _telling_failures("ending Ray Serve"):
                if not ray_serve.status().applications:
                    ray_serve.shutdown()


def _has_place(address: str, asked: HTTPOptions) -> bool:
    """Whether Ray Serve runs on the cluster already, as `asked` and with room for an endpoint;
    `ConfigError` where it does otherwise: what it holds would win, or be replaced.
    """
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    held, details = client.http_config, client.get_serve_details()
    routes = {name: about["route_prefix"] for name, about in details["applications"].items()}
    if APP in routes:
        raise ConfigError(
            f"--address {address}: the Ray cluster runs the application {APP!r} already: stop that "
            f"`hone serve`; when it was killed, `ray.serve.delete({APP!r})` removes what it left"
        )
    if "/" in routes.values():
        name = next(name for name, route in routes.items() if route == "/")
        raise ConfigError(
            f"--address {address}: the application {name!r} of the Ray cluster answers at '/' "
            "already: give it another route prefix, or delete it first"
        )
    fields = ("host", "port", "ssl_keyfile", "ssl_certfile")
    if any(getattr(held, field) != getattr(asked, field) for field in fields):
        tls = f"TLS certificate {held.ssl_certfile}" if held.ssl_certfile else "no TLS"
        raise ConfigError(
            f"--address {address}: Ray Serve listens at {held.host}:{held.port} ({tls}) there "
            "already: ask for that, or end it first (`ray.serve.shutdown()`)"
        )
    return True


@contextmanager
def _naming_failures(settings: EndpointSettings) -> Generator[None]:
    """What Ray Serve raises inside is a `StageError` that names the log."""
    try:
        yield
    except _FAILURES as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise StageError("endpoint", f"{last} (log: {settings.home}/logs/endpoint.log)") from error


@contextmanager
def _telling_failures(what: str) -> Generator[None]:
    """What fails at the end is logged: it must not hide why the endpoint ended."""
    try:
        yield
    except _FAILURES as error:
        logger.warning("%s: %s", what, error)


def application(
    settings: EndpointSettings, replicas: int, door: Door | None = None
) -> ray_serve.Application:
    """What Ray Serve deploys: `replicas` copies of `PolicyReplica`, which listen at `door` or leave
    that to the proxies.
    """
    env = QUIET_ENV | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if settings.engine.tensor_parallel_size == 1:
        env |= ALONE_ENV
    if not settings.engine.is_gpu:
        threads = max(1, (os.cpu_count() or 1) // (replicas * settings.max_engines))
        env |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    deployment: Any = ray_serve.deployment(
        ray_serve.ingress()(PolicyReplica) if door is None else PolicyReplica,
        name="policy",
        num_replicas=replicas,
        max_ongoing_requests=2 * (settings.limits.running + settings.limits.queued),
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=HEALTH_S,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=MAX_STARTS,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": settings.engine.tensor_parallel_size if settings.engine.is_gpu else 0,
            "runtime_env": {"env_vars": env},
        },
    )
    return deployment.bind(settings, door)


@contextmanager
def _cluster(address: str) -> Generator[None]:
    """A Ray of our own on loopback, or the one at `address`."""
    os.environ.update(QUIET_ENV | _PATIENCE)
    ray_token.ensure(may_create=address == "local")
    common: dict[str, Any] = {
        "namespace": "hone",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address != "local":
        join(address, **common)
        try:
            yield
        finally:
            ray.shutdown()
        return
    with own_ray(max(4, os.cpu_count() or 1), _PATIENCE, **common):
        yield
