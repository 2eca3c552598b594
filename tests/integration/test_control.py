"""The door of a run: a request is carried out once."""

import msgspec

from cluster.control import ControlServer, Request
from cluster.redis_client import connect
from cluster.replay_keys import Keys

FAR_MS = 1 << 50


def test_a_request_that_was_pushed_twice_is_carried_out_once(url: str) -> None:
    """A push whose reply is lost is made again."""
    client = connect(url)
    server = ControlServer(client, "asked")
    server.open()
    for number in ("a", "a", "b", "a"):
        request = Request(id=number, command="rewards.rollback", arguments={}, deadline_ms=FAR_MS)
        client.rpush(Keys("asked").requests, msgspec.json.encode(request))
    begun = [request.id for _ in range(4) if (request := server.next(0.1)) is not None]
    assert begun == ["a", "b"]
