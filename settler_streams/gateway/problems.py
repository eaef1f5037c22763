"""Problems: every refusal is an ``application/problem+json`` document (RFC 9457)."""

from __future__ import annotations

import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from settler_streams.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    SettlerError,
    UnavailableError,
)
from settler_streams.services import AuthenticationError

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED_CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
"""Both are defined by draft-ietf-httpapi-ratelimit-headers, as is the member ``violated-policies``."""
BLANK = "about:blank"
RETRY_AFTER_DEFAULT_S = 1
"""When nobody knows how long a shortage lasts."""

_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    409: "Conflict",
    413: "Content Too Large",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


def problem(
    status: int, detail: str, *, kind: str = BLANK, headers: dict[str, str] | None = None, **members: Any
) -> Response:
    """A problem document; ``members`` extend it."""
    body = {"type": kind, "title": _TITLES.get(status, "Error"), "status": status, "detail": detail, **members}
    return JSONResponse(body, status, headers=headers, media_type="application/problem+json")


def quota_exceeded(detail: str, policy: str, retry_after_ms: int | None, **members: Any) -> Response:
    """429, with the violated policy and ``Retry-After``."""
    headers = {"Retry-After": str(retry_after_s(retry_after_ms))}
    return problem(429, detail, kind=QUOTA_EXCEEDED, headers=headers, **{"violated-policies": [policy]}, **members)


def unavailable(detail: str, **members: Any) -> Response:
    """503, with ``Retry-After``."""
    headers = {"Retry-After": str(RETRY_AFTER_DEFAULT_S)}
    return problem(503, detail, kind=REDUCED_CAPACITY, headers=headers, **members)


def unauthenticated() -> Response:
    """401, and how to do better."""
    return problem(401, "a valid API key is needed", headers={"WWW-Authenticate": "Bearer"})


def retry_after_s(retry_after_ms: int | None) -> int:
    """Whole seconds, rounded up, at least one."""
    return RETRY_AFTER_DEFAULT_S if retry_after_ms is None else max(1, math.ceil(retry_after_ms / 1000))


async def on_settler_error(_request: Request, error: Exception) -> Response:
    """What an error of ours means over HTTP."""
    match error:
        case AuthenticationError():
            return unauthenticated()
        case InvalidRequestError():
            return problem(400, str(error))
        case NotFoundError():
            return problem(404, str(error))
        case ConflictError():
            return problem(409, str(error))
        case UnavailableError():
            return unavailable(str(error))
        case _:
            raise error


async def on_http_exception(_request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, a method that a path does not have."""
    if not isinstance(error, HTTPException):
        raise error
    return problem(error.status_code, error.detail, headers=dict(error.headers or {}))


async def on_unexpected(_request: Request, _error: Exception) -> Response:
    """An error of the program: logged by whoever raised it here, and told to nobody outside."""
    return problem(500, "the request failed; it is logged")


HANDLERS = {SettlerError: on_settler_error, HTTPException: on_http_exception, Exception: on_unexpected}
