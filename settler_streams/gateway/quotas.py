"""Quotas over HTTP: where the caller's own tenant stands."""

from __future__ import annotations

import datetime as dt
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from settler_streams.gateway.operations import gateway_of, principal_of
from settler_streams.services import QuotaStanding


async def show(request: Request) -> Response:
    """GET /v1/quotas: one item for each quota, the tenant's own figures."""
    standings = await gateway_of(request).quotas.standings(principal_of(request).tenant_id)
    return JSONResponse({"items": [_item(standing) for standing in standings]})


def _item(standing: QuotaStanding) -> dict[str, Any]:
    item: dict[str, Any] = {
        "quota": standing.quota_type,
        "used": standing.used,
        "limit": standing.limit,
        "bound_by": standing.bound_by,
    }
    if standing.per_minute is not None:
        item["per_minute"] = standing.per_minute
    if standing.window_end_ms is not None:
        item["window_ends_at"] = dt.datetime.fromtimestamp(standing.window_end_ms / 1000, dt.UTC).isoformat()
    return item
