"""Operations: what the gateway offers, as a table that the router and the OpenAPI document are both made from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from settler_streams.gateway.gateway import Gateway
from settler_streams.gateway.problems import problem
from settler_streams.services import Principal, Scope

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter or header of an operation."""

    name: str
    where: str
    doc: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. ``scope`` is what the API key needs; None: no key at all."""

    method: str
    path: str
    endpoint: Endpoint
    scope: Scope | None
    summary: str
    responses: Mapping[int, str]
    body: type[BaseModel] | None = None
    parameters: tuple[Parameter, ...] = ()

    def guarded(self) -> Endpoint:
        """The endpoint behind the check of the key's scope."""
        scope, endpoint = self.scope, self.endpoint

        async def checked(request: Request) -> Response:
            if scope is not None and scope not in principal_of(request).scopes:
                return problem(403, f"the API key lacks the scope {scope}")
            return await endpoint(request)

        return checked


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves ``request``."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)  # noqa: S101 - set once by create_app
    return gateway


def principal_of(request: Request) -> Principal:
    """Whom the request's API key speaks for; the tenant middleware has put it there."""
    principal = request.state.principal
    assert isinstance(principal, Principal)  # noqa: S101 - no route with a scope is reached without it
    return principal
