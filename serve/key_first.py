"""A key before a body: FastAPI reads the body of a route that declares one before our code runs.

Invariant: nothing of a change that its sender may not make is read. Around the application of
`serve.http_api`; the routes under `/v1` read their bodies themselves, after the key.
"""

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission import Admission
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
            except ApiError as refusal:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
