"""The HTTP face of the endpoint: OpenAI's routes for everyone with a key, admin routes beside them.

Invariant: every route but the health check, the page and the API document asks for a key of its
scope before it reads a body, and every failure leaves as OpenAI's error object. vLLM's own control
routes (pause, weight update) are not mounted.
"""

import logging
import os
import uuid
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from actors.openai_reply import Api, Trace
from serve import api_document
from serve.admission import Admission, check_body, read_json
from serve.api_errors import ApiError, error_body, from_engine
from serve.api_keys import ApiKey, KeyStore
from serve.client_presence import Stream, while_connected
from serve.key_first import KeyFirst
from serve.service import NAME, PolicyService
from serve.traffic import Traffic

logger = logging.getLogger(__name__)


def build(service: PolicyService) -> FastAPI:
    """The whole application of one replica."""
    from serve import admin_api

    settings = service.settings
    admission = Admission(KeyStore(settings.keys), settings.limits, settings.is_open)
    app = FastAPI(title="Hone policy endpoint", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(KeyFirst, admission=admission)
    app.add_middleware(Traffic)
    _handle_errors(app)
    errors = api_document.errors()

    @app.get("/health", summary="Whether the engines run; needs no key")
    async def health() -> JSONResponse:
        is_healthy = await service.is_healthy()
        status = 200 if is_healthy else 503
        return JSONResponse({"ok": is_healthy}, status, {"x-replica": str(os.getpid())})

    def cards() -> dict[str, dict[str, Any]]:
        names = [NAME, f"{NAME}@latest"]
        names += [f"{NAME}@{v.policy_version}" for v in service.library.versions()]
        card = {"object": "model", "created": 0, "owned_by": "hone",
                "max_model_len": settings.engine.context_length}  # fmt: skip
        return {name: {"id": name, **card} for name in names}

    @app.get("/v1/models", responses=errors, summary="Names that requests may use")
    async def models(request: Request) -> JSONResponse:
        admission.identify(request, "query")
        return JSONResponse({"object": "list", "data": [*cards().values()]})

    @app.get("/v1/models/{model}", responses=errors, summary="One of these names")
    async def one_model(request: Request, model: str) -> JSONResponse:
        admission.identify(request, "query")
        card = cards().get(model)
        if card is None:
            raise ApiError(
                404, f"model {model[:80]!r} does not exist", code="model_not_found", param="model"
            )
        return JSONResponse(card)

    @app.post("/v1/chat/completions", responses=errors, openapi_extra=api_document.body("chat"))
    async def chat(request: Request) -> Response:
        return await _complete(service, admission, "chat", request)

    @app.post("/v1/completions", responses=errors, openapi_extra=api_document.body("completion"))
    async def completions(request: Request) -> Response:
        return await _complete(service, admission, "completion", request)

    admin_api.attach(app, service, admission, errors)
    api_document.complete(app)
    return app


async def _complete(
    service: PolicyService, admission: Admission, api: Api, request: Request
) -> Response:
    key = admission.identify(request, "query")
    admission.charge_request(key)
    limits = admission.limits
    body = await read_json(request, limits.body_bytes)
    num_answers = check_body(api, body, limits)
    stack, trace = AsyncExitStack(), Trace()
    try:
        stack.enter_context(admission.places(num_answers))
        admission.charge(key, requests=num_answers - 1)
        stack.callback(_charge, admission, key, trace)
        work = service.answer(api, body, trace)
        answer = await (work if body.get("stream") else while_connected(request, work))
        stack.push_async_callback(answer.stack.aclose)
        headers = {
            "x-policy-version": ",".join(map(str, answer.policy_versions)),
            "x-request-id": uuid.uuid4().hex,
        } | admission.rate_headers(key)
        reply = answer.reply
        if reply.events is not None:
            return Stream(reply.events, headers, stack.pop_all(), limits.deadline_s)
        content = reply.body if reply.status < 400 else from_engine(reply.status, reply.body)
        return JSONResponse(content, reply.status, headers)
    finally:
        await stack.aclose()


def _charge(admission: Admission, key: ApiKey, trace: Trace) -> None:
    admission.charge(key, tokens=trace.num_tokens)


def _handle_errors(app: FastAPI) -> None:
    async def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def malformed(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_body(400, f"{param}: {first['msg']}", param=param or None), 400)

    async def unrouted(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    async def broken(request: Request, error: Exception) -> Response:
        request_id = uuid.uuid4().hex
        logger.error("%s failed, request %s", request.url.path, request_id, exc_info=error)
        content = error_body(500, f"the endpoint failed; its log tells of request {request_id}")
        return JSONResponse(content, 500, {"x-request-id": request_id})

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(Exception, broken)
