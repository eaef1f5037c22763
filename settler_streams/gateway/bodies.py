"""Request bodies and headers: read into event types, or refused with the field and the rule."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from settler_streams.errors import InvalidRequestError
from settler_streams.events import Part, misfit_of
from settler_streams.ids import TenantId, derived_id, is_uuid7

PROBLEMS_TOLD_MAX = 10
"""Mistakes named in one answer; an inline record set could have thousands."""

MISTAKES_BODY_BYTES_MAX = 8 * 1024
"""Longest body whose mistakes are all looked for: two bytes can hold one, and each costs 8 us of everybody's loop."""
MODEL_BODY_BYTES_MAX = 32 * 1024
"""Longest body of a model: more than twice a flag change with all its texts in escapes."""

_IDEMPOTENCY_KEY = re.compile(r'"?([\x21\x23-\x7e]{1,255})"?')

P = TypeVar("P", bound=Part)
M = TypeVar("M", bound=BaseModel)


def read_model(model: type[M], body: bytes) -> M:
    """``body`` as ``model``.

    Raises:
        InvalidRequestError: naming each field that breaks its rule, or the body is too long.
    """
    if len(body) > MODEL_BODY_BYTES_MAX:
        raise InvalidRequestError(f"body: at most {MODEL_BODY_BYTES_MAX} bytes here")
    return _validated(model, body)


def _validated(model: type[M], body: bytes) -> M:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        told = [
            f"{'.'.join(str(place) for place in e['loc']) or 'body'}: {e['msg']}"
            for e in error.errors(include_url=False, include_context=False, include_input=False)[:PROBLEMS_TOLD_MAX]
        ]
        raise InvalidRequestError("; ".join(told)) from error


def read_event(event_type: type[P], body: bytes) -> P:
    """``body`` as an event's body, by the published schema.

    The struct stops at the first mistake and the model collects them all, so a long body has to pass the struct first.

    Raises:
        InvalidRequestError: naming each field that breaks its rule; of a long body, the first.
    """
    if len(body) > MISTAKES_BODY_BYTES_MAX:
        event = _decoded(event_type, body)
        _validated(event_type.model, body)
        return event
    _validated(event_type.model, body)
    return _decoded(event_type, body)


def _decoded(event_type: type[P], body: bytes) -> P:
    try:
        event = msgspec.json.decode(body, type=event_type)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(str(error)) from error
    if (misfit := misfit_of(event)) is not None:
        raise InvalidRequestError(misfit)
    return event


def idempotency_key(request: Request) -> str | None:
    """The ``Idempotency-Key`` header (draft-ietf-httpapi-idempotency-key-header), quoted or bare.

    Raises:
        InvalidRequestError: it is longer than 255 characters or not printable ASCII.
    """
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    match = _IDEMPOTENCY_KEY.fullmatch(given)
    if match is None:
        raise InvalidRequestError("an Idempotency-Key has 1 to 255 printable ASCII characters")
    return match[1]


def event_id_of(tenant_id: TenantId, key: str) -> str:
    """The event's id: the key itself if it is a UUID of version 7, otherwise derived from the tenant and the key.

    The same tenant and key always give the same id, and a derived one never meets another tenant's.
    """
    return key if is_uuid7(key) else derived_id(tenant_id, f"idempotency-key/{key}")


def read_integer(request: Request, name: str, default: int, *, least: int, most: int) -> int:
    """A query parameter.

    Raises:
        InvalidRequestError: it is not a whole number within ``least`` and ``most``.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not least <= int(text) <= most:
        raise InvalidRequestError(f"{name}: a whole number from {least} to {most}")
    return int(text)
