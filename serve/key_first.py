"""A key before a body: FastAPI reads the body of a route that declares one before our code runs.

Invariant: of a change that its sender may not make nothing is read, of another one no more than
`limits.body_bytes`. Around the application of `serve.http_api`; the routes under `/v1` read their
bodies themselves, after the key.
"""

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission import Admission, read_body
from serve.api_errors import ApiError


class KeyFirst:
    """ASGI middleware: a POST under `/admin/` needs a key with the scope `admin`."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_change = scope["type"] == "http" and scope["method"] == "POST"
        if is_change and scope["path"].startswith("/admin/"):
            try:
                self._admission.identify(Request(scope), "admin")
                body = await read_body(Request(scope, receive), self._admission.limits.body_bytes)
            except ApiError as refusal:
                await refusal.response()(scope, receive, send)
                return
            receive = _replay(body, receive)
        await self._app(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`body` in one message, then what else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
