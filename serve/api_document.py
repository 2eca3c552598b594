"""The API document: schemas of bodies and answers, from the types that the code itself uses.

Invariant: a field of `/v1/*` is documented if and only if `serve.admission` lets it through, and
every reference of the document resolves.
"""

# pyright: basic

from typing import Any

import msgspec
from fastapi import FastAPI

from actors.openai_engine import REQUESTS
from cluster.replay_records import BufferStats
from cluster.status import RunStatus
from serve import api_types, replay_queries, reward_changes
from serve.admission import FIELDS

KINDS = (
    RunStatus, BufferStats, api_types.Runs, api_types.Versions, api_types.Release,
    api_types.Metrics, api_types.Events, api_types.Samples, reward_changes.Listing,
    reward_changes.Trial, reward_changes.Shadow, reward_changes.Change,
    replay_queries.GroupFacts, replay_queries.Why,
)  # fmt: skip
_REFERENCE = "#/components/schemas/{name}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STATUSES = {
    400: "malformed", 401: "no valid key", 403: "the key lacks the scope", 404: "no such thing",
    408: "the body came too slowly", 409: "refused in the present state", 413: "too large",
    415: "not JSON", 429: "too many",
    503: "busy, try again", 504: "not finished in time",
}  # fmt: skip


def errors() -> dict[int | str, dict[str, Any]]:
    """The refusals that any route may answer."""
    schema = {"$ref": _REFERENCE.format(name="Error")}
    return {
        status: {"description": words, "content": {"application/json": {"schema": schema}}}
        for status, words in STATUSES.items()
    }


def answers(*kinds: type[msgspec.Struct]) -> dict[int | str, dict[str, Any]]:
    """The answer 200 of a route: one of `kinds`, which must be in `KINDS`."""
    references = [{"$ref": _REFERENCE.format(name=kind.__name__)} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {200: {"description": "done", "content": {"application/json": {"schema": schema}}}}


def body(api: str) -> dict[str, Any]:
    """`openapi_extra` of an OpenAI route."""
    schema = {"$ref": _REFERENCE.format(name=f"{api.capitalize()}Body")}
    content = {"application/json": {"schema": schema}}
    return {
        "requestBody": {"content": content, "required": True},
        "security": [{"key": []}],
    }


def complete(app: FastAPI) -> None:
    """Give the document of `app` its schemas, and say how to authenticate."""
    written = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            whole = written()
            components = whole.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            schemas |= msgspec.json.schema_components(
                KINDS, schema_hook=_anything, ref_template=_REFERENCE
            )[1]
            schemas["Error"] = _ERROR
            for api, model in REQUESTS.items():
                schemas |= _body_schemas(api, model)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            whole["security"] = [{"key": []}]
            app.openapi_schema = whole
        return app.openapi_schema

    app.openapi = document


def _anything(kind: type) -> dict[str, Any]:
    """The schema of `object`, the only type that msgspec does not know."""
    assert kind is object, kind
    return {"description": "any JSON value"}


def _body_schemas(api: str, model: Any) -> dict[str, Any]:
    """The allowed fields of a request model, with the definitions that they refer to."""
    schema = model.model_json_schema(ref_template=_REFERENCE.replace("{name}", "{model}"))
    definitions = schema.pop("$defs", {})
    known = schema["properties"]
    properties = {field: known.get(field, {}) for field in sorted(FIELDS[api])}
    needed: dict[str, Any] = {}
    waiting = [properties]
    while waiting:
        for name in _names(waiting.pop()):
            if name in definitions and name not in needed:
                needed[name] = definitions[name]
                waiting.append(definitions[name])
    required = ["model", "messages" if api == "chat" else "prompt"]
    return needed | {
        f"{api.capitalize()}Body": {
            "type": "object", "properties": properties, "required": required,
            "additionalProperties": False,
        }
    }  # fmt: skip


def _names(schema: object) -> list[str]:
    """Names of the schemas that `schema` refers to."""
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        own = [str(reference).rsplit("/", 1)[-1]] if reference else []
        return own + [name for value in schema.values() for name in _names(value)]
    if isinstance(schema, list):
        return [name for value in schema for name in _names(value)]
    return []
