"""The outbox: committed with the change, read by the relay alone."""

from __future__ import annotations

import asyncpg
import pytest

from settler_streams.adapters.postgres import outbox
from settler_streams.ids import PLATFORM

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
async def empty_outbox(owner):
    await owner.execute("TRUNCATE outbox")


async def append(pool, tenant_id, *events):
    async with pool.tenant(tenant_id) as tx:
        for event in events:
            await outbox.append(tx, tenant_id, "tenant-changes", tenant_id, event)


async def test_the_relay_reads_all_tenants_in_order_and_discards_what_was_sent(pool, create_tenant):
    first, second = await create_tenant(), await create_tenant()
    await append(pool, first, b"1", b"2")
    await append(pool, second, b"3")
    async with pool.relay() as tx:
        events = await outbox.pending(tx, 2)
        assert [(e.tenant_id, e.key, e.event) for e in events] == [(first, first, b"1"), (first, first, b"2")]
        await outbox.discard(tx, events)
    async with pool.relay() as tx:
        assert [e.event for e in await outbox.pending(tx, 10)] == [b"3"]


async def test_what_was_not_discarded_comes_again(pool, create_tenant):
    await append(pool, await create_tenant(), b"1")
    with pytest.raises(KeyError):
        async with pool.relay() as tx:
            await outbox.discard(tx, await outbox.pending(tx, 10))
            raise KeyError
    async with pool.relay() as tx:
        assert len(await outbox.pending(tx, 10)) == 1


async def test_an_aborted_change_leaves_no_event(pool, create_tenant):
    tenant_id = await create_tenant()
    with pytest.raises(KeyError):
        async with pool.tenant(tenant_id) as tx:
            await outbox.append(tx, tenant_id, "t", "k", b"1")
            raise KeyError
    async with pool.relay() as tx:
        assert await outbox.pending(tx, 10) == []


async def test_one_relay_works_at_a_time(pool, create_tenant):
    await append(pool, await create_tenant(), b"1")
    async with pool.relay() as tx:
        assert len(await outbox.pending(tx, 10)) == 1
        async with pool.relay() as other:
            assert await outbox.pending(other, 10) == []


async def test_no_tenant_reads_or_writes_the_outbox_of_another(pool, create_tenant):
    mine, theirs = await create_tenant(), await create_tenant()
    await append(pool, theirs, b"1")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with pool.tenant(mine) as tx:
            await outbox.append(tx, theirs, "t", "k", b"forged")
    async with pool.tenant(mine) as tx:
        await tx.execute("SET LOCAL ROLE settler_relay")
        assert await tx.fetch("SELECT * FROM outbox") == []
    async with pool.relay() as tx:
        await tx.execute("SELECT set_config('app.tenant_id', '', true)")
        assert await tx.fetch("SELECT * FROM outbox") == []


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM tenants",
        "SELECT * FROM stream_positions",
        "UPDATE outbox SET event = ''",
        f"INSERT INTO outbox (tenant_id, topic, key, event) VALUES ('{PLATFORM}', 't', 'k', '')",
    ],
)
async def test_the_relay_may_do_nothing_else(pool, statement):
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.relay() as tx:
            await tx.execute(statement)
