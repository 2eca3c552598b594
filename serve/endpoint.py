"""The Ray Serve application of the policy endpoint: replicas, health, and how it is started.

Invariant: the HTTP door binds to loopback unless asked otherwise, and never opens on another
address without keys. In a Ray of our own each replica is its own HTTP server; on a cluster Ray
Serve's proxies listen. Stopping takes the engines, their processes and their weight files with it,
and nothing that another endpoint of the run or another application of the cluster has.
"""

# pyright: basic

import gc
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions

from actors.connection import own_ray
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
        with _cluster(address):
            if not is_ours:
                _check_alone(address)
            try:
                _deploy(settings, door, replicas, is_ours=is_ours)
                told.parent.mkdir(exist_ok=True)
                told.write_text(door.url)
                yield door.url
            finally:
                if is_ours:
                    ray_serve.shutdown()
                else:
                    ray_serve.delete(APP)
    finally:
        if told.is_file() and told.read_text() == door.url:  # no later endpoint has written it
            told.unlink(missing_ok=True)
        sweep(run)


def _check_alone(address: str) -> None:
    """`ConfigError` when an endpoint runs on the cluster already: a second would replace it."""
    if APP in ray_serve.status().applications:
        raise ConfigError(
            f"--address {address}: the Ray cluster runs the application {APP!r} already: stop that "
            f"`hone serve`; when it was killed, `ray.serve.delete({APP!r})` removes what it left"
        )


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


def _deploy(settings: EndpointSettings, door: Door, replicas: int, *, is_ours: bool) -> None:
    ray_serve.start(
        proxy_location="Disabled" if is_ours else "HeadOnly",
        http_options=HTTPOptions(
            host=door.host,
            port=door.port,
            ssl_keyfile=door.tls_key,
            ssl_certfile=door.tls_cert,
        ),
    )
    try:
        at = door if is_ours else None
        ray_serve.run(application(settings, replicas, at), name=APP, route_prefix="/")
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise StageError("endpoint", f"{last} (log: {settings.home}/logs/endpoint.log)") from error


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
        ray.init(address=address, **common)
        try:
            yield
        finally:
            ray.shutdown()
        return
    with own_ray(max(4, os.cpu_count() or 1), _PATIENCE, **common):
        yield
