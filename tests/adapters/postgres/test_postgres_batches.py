"""A batch has rows of many tenants in one statement: each kind, new and again, and each row in its own context."""

from __future__ import annotations

from typing import get_args

import asyncpg
import msgspec
import pytest

from settler_streams.adapters.postgres.effects import DeadLetter, Effect, WebhookEvent
from settler_streams.ids import TenantId
from tests.adapters.postgres.test_postgres_projection import T0_MS, Log, new_id, one_of_each

pytestmark = pytest.mark.services

TABLES = {
    "job_decision": "jobs", "job_result": "jobs", "execution": "executions", "usage": "tenant_usage",
    "quota_usage": "tenant_quota_usage", "signal": "tenant_signals", "flag": "feature_flags",
    "audit_entry": "audit_logs", "dead_letter": "dead_letters",
}  # fmt: skip
VERSIONS = {"job_decision": "decision_version", "job_result": "result_version"}


def effect(kind, tenant_id):
    letter = DeadLetter(
        tenant_id=tenant_id, letter_partition=1, letter_offset=2, role="r", reason="bad", detail="d", origin_topic="t",
        origin_partition=0, origin_offset=3, attempts=1, refused_at_ms=T0_MS,
    )  # fmt: skip
    given = (*one_of_each(tenant_id, *(new_id() for _ in range(4))), letter)
    return next(each for each in given if kind == each.KIND)


def test_every_kind_that_is_a_row_of_the_tenants_is_here():
    assert set(TABLES) == {each.KIND for each in get_args(Effect)} - {WebhookEvent.KIND}


@pytest.mark.parametrize("kind", TABLES)
async def test_a_batch_has_a_row_of_each_of_several_tenants_new_and_again(pool, kind):
    log = await Log(pool).open()
    effects = [effect(kind, TenantId(new_id())) for _ in range(3)]
    await log.write(*effects)
    versioned = "source_version" in effects[0].__struct_fields__
    later = [msgspec.structs.replace(each, source_version=100) for each in effects] if versioned else effects
    await log.write(*later)  # meets the rows that are there
    for each in effects:
        async with pool.tenant(each.tenant_id) as tx:
            (row,) = await tx.fetch(f"SELECT * FROM {TABLES[kind]} WHERE tenant_id = $1", each.tenant_id)
        if versioned:
            assert row[VERSIONS.get(kind, "source_version")] == 100


_ROWS_OF_CONTEXTS = """
INSERT INTO tenant_signals (tenant_id, signal_id, kind, resource, signalled_at, source_version)
SELECT CASE in_context_of(context) WHEN context THEN tenant END, gen_random_uuid(), 'noisy', 'requests', now(), 1
FROM unnest($1::uuid[], $2::uuid[]) AS row (context, tenant)
"""


@pytest.mark.parametrize("foreign", range(3))
async def test_each_row_of_a_statement_is_checked_in_the_context_that_was_set_for_it(pool, foreign):
    contexts = [new_id() for _ in range(3)]
    async with pool.platform() as tx:
        await tx.execute(_ROWS_OF_CONTEXTS, contexts, contexts)
    for tenant_id in contexts:
        async with pool.tenant(TenantId(tenant_id)) as tx:
            assert await tx.fetchval("SELECT count(*) FROM tenant_signals") == 1
    tenants = contexts.copy()
    tenants[foreign] = contexts[foreign - 1]
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with pool.platform() as tx:
            await tx.execute(_ROWS_OF_CONTEXTS, contexts, tenants)
