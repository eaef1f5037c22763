"""Plans: what the gateway reads of a tenant among thousands is found by an index that begins with the tenant."""

from __future__ import annotations

import re

import pytest
import pytest_asyncio

from settler_streams.dev.bench.row_security import READS, filled, job, plan, tenant

pytestmark = pytest.mark.services

TENANTS = 10_000


@pytest_asyncio.fixture(scope="module")
async def crowded(cluster_settings):
    async with filled(cluster_settings, "plans", TENANTS) as pool:
        yield pool


@pytest.mark.parametrize("name", READS)
async def test_a_tenants_rows_are_found_by_an_index_of_the_tenant(crowded, name):
    query, arguments = READS[name]
    async with crowded.tenant(tenant(7), read_only=True) as tx:
        nodes = await plan(tx, query, arguments(tenant(7), job(7, 3)))
    scans = [node for node in nodes if "Relation Name" in node]
    assert scans
    for node in scans:
        assert node["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Heap Scan"), node
        below = [node, *node.get("Plans", ())]
        conditions = " ".join(inner.get("Index Cond", "") for inner in below)
        column = "id" if node["Relation Name"] == "tenants" else "tenant_id"
        assert re.search(rf"\b{column} = ", conditions), (node["Relation Name"], conditions)
        assert node["Plan Rows"] < 1_000


async def test_what_is_read_is_there(crowded):
    for query, arguments in READS.values():
        async with crowded.tenant(tenant(7), read_only=True) as tx:
            assert await tx.fetch(query, *arguments(tenant(7), job(7, 3)))
