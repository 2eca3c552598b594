"""Errors of the endpoint in the shape OpenAI clients expect.

Invariant: every failure of a request is one JSON object `{"error": {message, type, param, code}}`
with a fitting status, and no message carries a path, a traceback or a key.
"""

import re
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}
_PATH = re.compile(r"(?:/[\w.\-]+){2,}")
_LIMIT_WORDS = re.compile(r"maximum context length|context length|max_model_len", re.IGNORECASE)


class ApiError(Exception):
    """A refusal with an HTTP status. `retry_after_s` becomes the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}

    def response(self) -> JSONResponse:
        headers = {**self.headers}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s + 0.5)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, code=self.code, param=self.param)


def too_late(deadline_s: float) -> ApiError:
    return ApiError(504, f"not finished in {deadline_s:g} s", code="deadline_exceeded")


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The error object of `status`; file paths in `message` are blanked."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    text = _PATH.sub("...", message) if status != 404 else message
    return {
        "error": {
            "message": text,
            "type": kind,
            "param": param,
            "code": code or _CODES.get(status),
        }
    }


def from_engine(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """An engine's error body in OpenAI's terms."""
    error = body.get("error", {})
    message = str(error.get("message") or "the engine refused the request")
    param = error.get("param")
    is_too_long = status == 400 and _LIMIT_WORDS.search(message) is not None
    code = "context_length_exceeded" if is_too_long else None
    return error_body(status, message, code=code, param=param)
