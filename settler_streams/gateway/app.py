"""The gateway's ASGI application: the table of operations, and what stands in front of it."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope as AsgiScope

from settler_streams.events import JobRequested, UsageRecorded
from settler_streams.gateway import controls, health, jobs, quotas, results
from settler_streams.gateway.gateway import Gateway
from settler_streams.gateway.middleware import (
    BoundsMiddleware,
    ObservationMiddleware,
    QuotaMiddleware,
    TenantMiddleware,
)
from settler_streams.gateway.openapi import document
from settler_streams.gateway.operations import Operation, Parameter
from settler_streams.gateway.problems import HANDLERS
from settler_streams.services import Scope

_IDEMPOTENCY = Parameter(
    "Idempotency-Key", "header", "The same key again is the same job or event; a refused job needs another key."
)
_PAGE = (
    Parameter("limit", "query", "Rows of a page.", {"type": "integer", "minimum": 1, "maximum": jobs.PAGE_ROWS_MAX}),
    Parameter("cursor", "query", "`next_cursor` of the page before."),
)
_NO_JOB = {404: "The tenant has no such job."}
_NO_ROWS = _NO_JOB | {409: "The job has not finished, or ended without rows."}


async def _openapi(request: Request) -> Response:
    return JSONResponse(request.app.state.openapi)


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "POST",
        "/v1/jobs",
        jobs.submit,
        Scope.JOBS_WRITE,
        "Submit a reconciliation job.",
        {
            202: "Stored; `status` is `admitted`, or `pending` while admission has not decided.",
            403: "A flag switches jobs of this kind off, or the tenant is suspended.",
            413: "The body is too large; use files.",
            422: "No executor runs jobs of this kind.",
            429: "A quota or rate limit is exceeded; `violated-policies` names it.",
            503: "The pool is full, or it is unknown whether the job was stored.",
        },
        JobRequested.model,
        (_IDEMPOTENCY,),
    ),
    Operation("GET", "/v1/jobs/{job_id}", jobs.show, Scope.JOBS_READ, "Look a job up.", {200: "The job."} | _NO_JOB),
    Operation(
        "DELETE", "/v1/jobs/{job_id}", jobs.cancel, Scope.JOBS_WRITE, "Ask for a job to be cancelled.", {202: "Stored."}
    ),
    Operation(
        "GET",
        "/v1/jobs/{job_id}/matches",
        jobs.matches,
        Scope.JOBS_READ,
        "Matched pairs of the accepted attempt.",
        {200: "A page."} | _NO_ROWS,
        parameters=_PAGE,
    ),
    Operation(
        "GET",
        "/v1/jobs/{job_id}/unmatched",
        jobs.unmatched,
        Scope.JOBS_READ,
        "Unmatched rows of the accepted attempt.",
        {200: "A page."} | _NO_ROWS,
        parameters=_PAGE,
    ),
    Operation(
        "GET",
        "/v1/jobs/{job_id}/report",
        jobs.report,
        Scope.JOBS_READ,
        "Totals of the accepted attempt, per currency.",
        {200: "The report."} | _NO_ROWS,
    ),
    Operation(
        "GET",
        "/v1/results",
        results.results,
        Scope.JOBS_READ,
        "Finished jobs as server-sent events.",
        {200: "An event stream.", 503: "Too many streams are open, or the log cannot be read."},
        parameters=(
            Parameter("since", "query", "An RFC 3339 time, or `beginning`; absent: now."),
            Parameter("Last-Event-ID", "header", "Resume after this event; stronger than `since`."),
        ),
    ),
    Operation(
        "POST",
        "/v1/usage",
        controls.record_usage,
        Scope.USAGE_WRITE,
        "Record something that the tenant used; its custom domains are counted by the platform alone.",
        {202: "Stored."},
        UsageRecorded.model,
        (_IDEMPOTENCY,),
    ),
    Operation(
        "PUT",
        "/v1/flags/{flag}",
        controls.change_flag,
        Scope.FLAGS_WRITE,
        "Set, kill, revive or delete a flag of the tenant.",
        {202: "Stored; in effect within a second."},
        controls.FlagChange,
    ),
    Operation(
        "GET",
        "/v1/flags/{flag}",
        controls.show_flag,
        Scope.FLAGS_READ,
        "Evaluate a flag.",
        {200: "The evaluation."},
        parameters=(Parameter("user_id", "query", "Evaluate for this user of the tenant."),),
    ),
    Operation(
        "GET",
        "/v1/quotas",
        quotas.show,
        Scope.JOBS_READ,
        "Where the tenant stands with its quotas.",
        {
            200: "An item for each `quota`: the tenant's own `used` and `limit`, in bytes, jobs or domains (of the "
            "rate limit, requests at once, and the rate `per_minute`); `window_ends_at` of a monthly one; `bound_by`, "
            "who has least room: `tenant`, `parent` (at any level), or null when no limit holds.",
        },
    ),
    Operation("GET", "/livez", health.livez, None, "Whether the process lives.", {200: "It does."}),
    Operation("GET", "/readyz", health.readyz, None, "Whether to send traffic.", {200: "Yes.", 503: "No."}),
    Operation("GET", "/metrics", health.metrics, None, "Prometheus metrics, on private addresses.", {200: "Metrics."}),
    Operation("GET", "/openapi.json", _openapi, None, "This document.", {200: "OpenAPI 3.1."}),
)

UNMATCHED_ROUTE = "-"
"""Route label of a path that no operation has, so that paths made up by clients add no series."""


def create_app(gateway: Gateway) -> Starlette:
    """The application over an open gateway. Whoever opened the gateway closes it."""
    endpoints = [(operation, operation.guarded()) for operation in OPERATIONS]
    templates: dict[object, str] = {endpoint: operation.path for operation, endpoint in endpoints}

    def route_of(scope: AsgiScope) -> str:
        return templates.get(scope.get("endpoint"), UNMATCHED_ROUTE)

    app = Starlette(
        routes=[Route(op.path, endpoint, methods=[op.method]) for op, endpoint in endpoints],
        middleware=[
            Middleware(ObservationMiddleware, route_of=route_of),
            Middleware(BoundsMiddleware),
            Middleware(TenantMiddleware, gateway=gateway),
            Middleware(QuotaMiddleware, gateway=gateway),
        ],
        exception_handlers=HANDLERS,
    )
    app.state.gateway = gateway
    app.state.openapi = document(OPERATIONS)
    return app
