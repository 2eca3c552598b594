"""Where ranks meet: the port that was named is that of the store, and of no other address."""

import socket

import pytest

from learners.rendezvous import find_store, store_of


def test_a_port_is_taken_when_it_is_named() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((host, port))
    store = store_of(listener, timeout_s=5)
    assert store.port == port
    find_store(host, port, timeout_s=5).set("key", "value")
    assert store.get("key") == b"value"


def test_it_listens_on_one_address() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = store_of(listener, timeout_s=5)
    assert store.host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
