"""Usage and flags over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from settler_streams.errors import InvalidRequestError
from settler_streams.events import FlagAction, FlagCommand, FlagScope, Resource, UsageRecorded, misfit_of
from settler_streams.events.fields import PerMille, Text, Uuid
from settler_streams.gateway.bodies import idempotency_key, read_event, read_model
from settler_streams.gateway.operations import gateway_of, principal_of
from settler_streams.ids import derived_id
from settler_streams.tiers import LIMIT_MAX


class FlagChange(BaseModel):
    """What to do to a flag of the caller's tenant, or of one of its users."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    action: FlagAction = FlagAction.SET
    enabled: bool = True
    rollout_per_mille: PerMille = 1000
    user_id: Uuid | None = None
    salt: Text = ""
    reason: Text = ""


async def record_usage(request: Request) -> Response:
    """POST /v1/usage."""
    gateway, principal = gateway_of(request), principal_of(request)
    used = read_event(UsageRecorded, await request.body())
    if used.resource is Resource.CUSTOM_DOMAINS:
        # Else one tenant's word would take or give room that its parents and their other children share. Requests,
        # worker time and reconciliations do no harm: no fold counts them by such an event.
        raise InvalidRequestError("resource: custom_domains are counted by the platform, as domains are verified")
    if abs(used.quantity) > LIMIT_MAX:
        # Counts have 64 bits: one event of a child must not leave its parents and their other children no room in them.
        raise InvalidRequestError(f"quantity: from -{LIMIT_MAX} to {LIMIT_MAX}")
    key = idempotency_key(request)
    # Never a job's id, which the same key gives: admission would take the later of the two for a repetition.
    event_id = derived_id(principal.tenant_id, f"usage-idempotency-key/{key}") if key is not None else None
    stored = await gateway.publisher.publish(
        "usage-events", principal.tenant_id, principal.root_id, used, event_id=event_id
    )
    return JSONResponse({"event_id": stored}, 202)


async def change_flag(request: Request) -> Response:
    """PUT /v1/flags/{flag}: stored as a command; in effect once the flags agent has accepted it.

    One that it refuses, as a tenant has too many settings, becomes a dead letter.
    """
    gateway, principal = gateway_of(request), principal_of(request)
    change = read_model(FlagChange, await request.body())
    scope = FlagScope.TENANT if change.user_id is None else FlagScope.USER
    fields: dict[str, Any] = change.model_dump(mode="json")
    fields |= {"flag": request.path_params["flag"], "scope": scope, "actor": principal.actor}
    try:
        command = msgspec.convert(fields, FlagCommand)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error)) from error
    if (misfit := misfit_of(command)) is not None:
        raise InvalidRequestError(misfit)
    event_id = await gateway.publisher.publish("flag-commands", principal.tenant_id, principal.root_id, command)
    return JSONResponse({"event_id": event_id}, 202)


async def show_flag(request: Request) -> Response:
    """GET /v1/flags/{flag}: the evaluation for the tenant, or for one of its users."""
    gateway, principal = gateway_of(request), principal_of(request)
    flag = request.path_params["flag"]
    answer = gateway.flags.evaluate(flag, principal.tenant_id, request.query_params.get("user_id"))
    return JSONResponse({"flag": flag, "enabled": answer.enabled, "reason": answer.reason, "version": answer.version})
