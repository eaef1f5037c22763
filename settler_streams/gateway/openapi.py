"""The OpenAPI 3.1 document, made from the table of operations and the models that validate the bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from settler_streams.gateway.operations import Operation

_REFUSALS = {401: "No valid API key.", 403: "The key lacks the scope, or a header names another tenant."}
_EVERYWHERE = {400: "The request breaks a rule.", 429: "The http rate limit.", 503: "Try again later."}


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The whole document, ready to be encoded."""
    bodies = [operation.body for operation in operations if operation.body is not None]
    references, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        body = references[operation.body, "validation"] if operation.body is not None else None
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Settler Streams gateway", "version": version("settler-streams")},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"] | {"Problem": _PROBLEM},
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer", "bearerFormat": "sk_<tenant>_<secret>"}},
        },
    }


_PROBLEM = {
    "type": "object",
    "description": "RFC 9457. A refused job adds `job_id` and admission's `decision`.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "violated-policies": {"type": "array", "items": {"type": "string"}},
    },
}


def _described(operation: Operation, body: Any) -> dict[str, Any]:
    answers = dict(operation.responses)
    if operation.scope is not None:
        answers = _REFUSALS | _EVERYWHERE | answers
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", operation.path)
        ]
        + [{"name": p.name, "in": p.where, "description": p.doc, "schema": p.schema} for p in operation.parameters],
        "responses": {str(status): _answer(status, doc) for status, doc in sorted(answers.items())},
        "security": [] if operation.scope is None else [{"apiKey": [str(operation.scope)]}],
    }
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return described


def _answer(status: int, doc: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": doc}
    if status >= 400:
        schema = {"$ref": "#/components/schemas/Problem"}
        answer["content"] = {"application/problem+json": {"schema": schema}}
    return answer
