"""The HTTP server of a replica: clients talk to the process that holds the engines.

Invariant: no proxy stands between a client and a replica, so a streamed token crosses one process
boundary, the engine's own. Replicas of one machine share the port (SO_REUSEPORT): the kernel hands
each connection to one of them. Used where Ray is ours alone; on a cluster Ray Serve's proxies
listen.
"""

import asyncio
import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from cluster.errors import ConfigError, StageError
from serve.endpoint_settings import Door

if TYPE_CHECKING:
    from fastapi import FastAPI

CLOSE_S = 5.0
KEEP_ALIVE_S = 75


class FrontDoor:
    """Example: `front = FrontDoor(Door(port=8000)); await front.open(app); await front.close()`."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self, app: "FastAPI") -> None:
        """Listen; `StageError` when the address cannot be had."""
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._server = server = uvicorn.Server(
            uvicorn.Config(
                app,
                ssl_keyfile=self._door.tls_key,
                ssl_certfile=self._door.tls_cert,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=round(CLOSE_S),
                lifespan="off",
                access_log=False,
                log_config=None,
                ws="none",
                server_header=False,
            )
        )
        opened = listen(self._door, is_shared=True)
        self._task = asyncio.create_task(server.serve(sockets=[opened]))
        while not server.started:
            if self._task.done():
                raise StageError("endpoint", f"the HTTP server ended: {self._task.exception()}")
            await asyncio.sleep(0.01)

    @property
    def is_open(self) -> bool:
        return self._task is not None and not self._task.done()

    async def close(self) -> None:
        """Take no more connections; give requests that run `CLOSE_S` to end."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._task, 2 * CLOSE_S)


def listen(door: Door, *, is_shared: bool) -> socket.socket:
    """A socket bound to the door; `ConfigError` names --port when it is taken.

    `is_shared` lets other replicas of this user bind it, too.
    """
    family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        opened.bind((door.host, door.port))
    except OSError as error:
        opened.close()
        raise ConfigError(
            f"--host {door.host} --port {door.port}: cannot listen there: {error.strerror}"
        ) from None
    return opened
