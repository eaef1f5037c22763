"""Onboarding: how far a tenant has come, read off what is there. Nothing of it is stored."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.errors import NotFoundError
from settler_streams.ids import TenantId
from settler_streams.services import queries


class Step(enum.StrEnum):
    """What a new tenant does, in the order in which it makes sense."""

    OWNER = "owner"
    API_KEY = "api-key"
    DOMAIN_OR_WEBHOOK = "domain-or-webhook"
    FIRST_JOB = "first-job"


@dataclass(frozen=True, slots=True)
class Onboarding:
    """Which steps are done: an active owner, a key in force, a verified domain or an active webhook, a job that ended.

    A step can be open again, such as when the last key is revoked. A job that has gone with its retention period is
    a step that is open; a tenant with a history has other worries.
    """

    steps: dict[Step, bool]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(self.steps.values())

    @property
    def next(self) -> Step | None:
        """The first step that is open."""
        return next((step for step, done in self.steps.items() if not done), None)


class OnboardingService:
    """Tells how far tenants have come."""

    def __init__(self, pool: TenantConnectionPool) -> None:
        self._pool = pool

    async def get(self, tenant_id: TenantId) -> Onboarding:
        """How far the tenant has come.

        Raises:
            NotFoundError: there is no such tenant.
        """
        async with self._pool.tenant(tenant_id) as tx:
            row = await tx.fetchrow(queries.READ_ONBOARDING, tenant_id)
        if row is None:
            raise NotFoundError(f"no tenant {tenant_id}")
        return Onboarding(dict(zip(Step, row, strict=True)))
