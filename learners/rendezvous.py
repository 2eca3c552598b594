"""Where processes of torch meet: a store on one port of one address.

Invariant: a port is taken when it is named, by the socket on which the store then listens, so that
nobody else can get it in between; and it listens on that address alone (torch by itself would
listen on all, and it asks nobody for a password).
"""

import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def open_store(host: str, timeout_s: float) -> TCPStore:
    """At a free port of `host`."""
    return store_of(socket.create_server((host, 0)), timeout_s)


def store_of(listener: socket.socket, timeout_s: float) -> TCPStore:
    """The store that listens on `listener`, which it takes over."""
    host, port = listener.getsockname()
    return _store(host, port, timeout_s, is_master=True, master_listen_fd=listener.detach())


def find_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """The store that another process has opened, or whose socket it holds already."""
    return _store(host, port, timeout_s, is_master=False)


def _store(host: str, port: int, timeout_s: float, **role: Any) -> TCPStore:
    return TCPStore(
        host,
        port,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        use_libuv=False,  # not every libuv server of torch takes over a socket
        **role,
    )
