"""Onboarding is what is there: each step is done as long as what it asks for exists."""

from __future__ import annotations

import pytest

from settler_streams.errors import NotFoundError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import OnboardingService, Role, Scope, Step, UserService
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services

WEBHOOK = (
    "INSERT INTO webhooks (tenant_id, id, url, secret_encrypted, secret_key_id, status)"
    " VALUES ($1, $2, 'https://a', 's', 'k', 'paused')"
)
DOMAIN = "INSERT INTO domains (tenant_id, id, domain, verification_token) VALUES ($1, $2, 'a.example', 't')"
JOB = "INSERT INTO jobs (tenant_id, job_id, decision, decision_version) VALUES ($1, $2, 'admitted', 0)"


async def execute(platform: Platform, tenant_id: TenantId, statement: str, *arguments: object) -> None:
    async with platform.pool.tenant(tenant_id) as tx:
        await tx.execute(statement, *arguments)


async def test_each_step_is_done_while_what_it_asks_for_is_there(platform: Platform) -> None:
    service = OnboardingService(platform.pool)
    tenant, owner = await platform.new_tenant()

    async def open_steps() -> list[Step]:
        onboarding = await service.get(tenant.id)
        still_open = [step for step, done in onboarding.steps.items() if not done]
        assert onboarding.next == (still_open[0] if still_open else None)
        assert onboarding.done is not bool(still_open)
        return still_open

    assert await open_steps() == [Step.API_KEY, Step.DOMAIN_OR_WEBHOOK, Step.FIRST_JOB]
    issued = await platform.tenants.issue_api_key(tenant.id, list(Scope))
    await execute(platform, tenant.id, JOB, tenant.id, uuid7(1))
    await execute(platform, tenant.id, WEBHOOK, tenant.id, uuid7(1))
    await execute(platform, tenant.id, DOMAIN, tenant.id, uuid7(1))
    assert await open_steps() == [Step.DOMAIN_OR_WEBHOOK, Step.FIRST_JOB], "a paused one, a pending one, no end yet"
    await execute(platform, tenant.id, "UPDATE webhooks SET status = 'active'")
    assert await open_steps() == [Step.FIRST_JOB]
    await execute(platform, tenant.id, "DELETE FROM webhooks")
    await execute(platform, tenant.id, "UPDATE domains SET status = 'verified', verified_at = now()")
    await execute(platform, tenant.id, "UPDATE jobs SET finished_at = now()")
    assert await open_steps() == []
    await platform.tenants.api_keys.revoke(tenant.id, issued.id)
    second = await UserService(platform.pool).invite(tenant.id, "second@acme.example", Role.OWNER)
    assert second.user.id != owner.id
    assert await open_steps() == [Step.API_KEY]
    other = (await platform.new_tenant()).tenant
    assert (await service.get(other.id)).next is Step.API_KEY
    with pytest.raises(NotFoundError):
        await service.get(TenantId(uuid7(1)))
