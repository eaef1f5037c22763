"""Plans: what is read, written or deleted of a tenant among thousands is found by an index that begins with it."""

from __future__ import annotations

import contextlib
import json
import re
from typing import get_args

import pytest
import pytest_asyncio

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.effects import Effect
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.dev.bench.row_security import READS, database, filled, job, plan, tenant
from settler_streams.ids import PLATFORM
from tests.adapters.postgres.conftest import owner_of
from tests.isolation.made_batches import Names, batch_of, effects

pytestmark = pytest.mark.services

TENANTS = 10_000

# A row of each tenant in every table that the benchmark does not fill; of an empty one no index is of use.
_MORE = """
CREATE TEMP TABLE crowd AS SELECT id AS tenant FROM tenants;
INSERT INTO users (tenant_id, id, email, password_hash, role) SELECT tenant, tenant, 'a@b', 'h', 'owner' FROM crowd;
INSERT INTO domains (tenant_id, id, domain, verification_token) SELECT tenant, tenant, 'a.example', 't' FROM crowd;
INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body)
SELECT tenant, tenant, gen_random_uuid(), 't', '{}' FROM crowd, generate_series(1, 5);
INSERT INTO tenant_usage SELECT tenant, 'jobs', 'epoch'::timestamptz + hour * interval '1 hour', 3600, 1, 0
FROM crowd, generate_series(1, 5) AS hour;
INSERT INTO feature_flags (tenant_id, flag, scope, enabled, changed_by, changed_at, source_version)
SELECT tenant, 'beta', 'tenant', true, 'me', now(), 0 FROM crowd;
INSERT INTO tenant_retention (tenant_id, kind, keep_days)
SELECT tenant, kind, 365 FROM crowd, unnest(ARRAY['executions', 'usage', 'audit']) AS kind;
INSERT INTO tenant_children SELECT tenant, gen_random_uuid() FROM crowd;
INSERT INTO dead_letters SELECT tenant, 0, n, 'admission', 'not-json', 'd', 't', 0, 0, 1, now()
FROM crowd, generate_series(1, 5) AS n;
INSERT INTO audit_logs (tenant_id, id, actor, action, subject, recorded_at)
SELECT tenant, gen_random_uuid(), 'a', 'b', 'c', now() FROM crowd, generate_series(1, 5);
INSERT INTO outbox (tenant_id, topic, key, event) SELECT tenant, 't', 'k', '' FROM crowd;
VACUUM ANALYZE;
"""


@pytest_asyncio.fixture(scope="module")
async def crowded(cluster_settings):
    async with filled(cluster_settings, "plans", TENANTS) as pool:
        yield pool


@pytest_asyncio.fixture(scope="module")
async def crowd(cluster_settings, crowded):
    """The settings of that database, in which every tenant has rows in every table."""
    settings = database(cluster_settings, "plans")
    async with owner_of(settings) as owner:
        for statement in _MORE.strip().split(";\n"):
            await owner.execute(statement)
    return settings


class Plans:
    """A session of the services' login whose server tells how it runs each statement, those inside functions too."""

    def __init__(self, connection):
        self.connection = connection
        self._told = []
        connection.add_log_listener(lambda _, message: self._told.append(message.message))

    async def of(self, query: str, *arguments) -> list[dict]:
        """The nodes of the plans by which the statement, and what it calls, was run."""
        self._told.clear()
        await self.connection.fetch(query, *arguments)
        await self.connection.execute("SELECT")  # ends what was run: a plan is told at the end
        plans = [text.partition("plan:\n")[2] for text in self._told]
        return [node for each in plans if each for node in nodes_of(json.loads(each)["Plan"])]


def nodes_of(node: dict) -> list[dict]:
    return [node, *(found for below in node.get("Plans", ()) for found in nodes_of(below))]


@contextlib.asynccontextmanager
async def plans_of(settings, mode: str):
    """What the server told, in a transaction of the services' login that is undone."""
    async with owner_of(settings) as connection:
        await connection.execute(
            f"LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
            f"SET auto_explain.log_format = json; SET auto_explain.log_level = notice; SET plan_cache_mode = {mode};"
            f"SET SESSION AUTHORIZATION {settings.db_app_user}; BEGIN"
        )
        yield Plans(connection)


SHORT = ("erasures", "tenant_schemas")
"""A row for each tenant that was erased or has a schema of its own. With ten thousand erased ones the recorder still
read all of them sooner than it looked for each tenant of a batch."""


def scans_of_tables(nodes: list[dict]) -> list[dict]:
    return [
        node
        for node in nodes
        if "Scan" in node["Node Type"] and "Relation Name" in node and node["Relation Name"] not in SHORT
    ]


def assert_found_by_the_tenant(node: dict) -> str:
    """Of a scan, that an index led it to a tenant's rows; returns the conditions."""
    assert node["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Heap Scan"), node
    conditions = " ".join(inner.get("Index Cond", "") for inner in nodes_of(node))
    column = "id" if node["Relation Name"] == "tenants" else "tenant_id"
    assert re.search(rf"\b{column} = ", conditions), (node["Relation Name"], conditions)
    return conditions


@pytest.mark.parametrize("name", READS)
async def test_a_tenants_rows_are_found_by_an_index_of_the_tenant(crowded, name):
    query, arguments = READS[name]
    async with crowded.tenant(tenant(7), read_only=True) as tx:
        nodes = await plan(tx, query, arguments(tenant(7), job(7, 3)))
    scans = [node for node in nodes if "Relation Name" in node]
    assert scans
    for node in scans:
        assert_found_by_the_tenant(node)
        assert node["Plan Rows"] < 1_000


@pytest.mark.parametrize("name", READS)
async def test_a_plan_that_is_kept_for_all_tenants_finds_each_ones_rows_by_the_index(crowd, name):
    """As after the fifth execution of a prepared statement: planned without its arguments."""
    query, arguments = READS[name]
    async with plans_of(crowd, "force_generic_plan") as plans:
        await TenantContext.set(plans.connection, tenant(7))
        scans = scans_of_tables(await plans.of(query, *arguments(tenant(7), job(7, 3))))
    assert scans
    assert any("$1" in assert_found_by_the_tenant(node) for node in scans)


@pytest.mark.parametrize("name", READS)
async def test_a_read_is_planned_once_and_not_for_each_call(crowded, name):
    """Planning takes as long as most reads, and longer under row-level security."""
    query, arguments = READS[name]
    async with crowded.tenant(tenant(7), read_only=True) as tx:
        for _ in range(6):  # five plans of the arguments' own, then one that is kept
            await tx.fetch(query, *arguments(tenant(7), job(7, 3)))
        kept = "SELECT generic_plans > 0 FROM pg_prepared_statements WHERE statement = $1"
        assert await tx.fetchval(kept, query)


async def test_what_is_read_is_there(crowded):
    for query, arguments in READS.values():
        async with crowded.tenant(tenant(7), read_only=True) as tx:
            assert await tx.fetch(query, *arguments(tenant(7), job(7, 3)))


KINDS = {
    "job_decision": "jobs_pkey", "job_result": "jobs_pkey", "execution": "executions_pkey",
    "usage": "tenant_usage_pkey", "quota_usage": "tenant_quota_usage_pkey", "signal": "tenant_signals_pkey",
    "flag": "feature_flags_pkey", "audit_entry": "audit_logs_pkey", "dead_letter": "dead_letters_pkey",
    "webhook_event": "webhook_lanes_pkey",
}  # fmt: skip
"""Of each kind of effect, the key by which the recorder's statement finds the row that is there; of a
webhook's event its lane, since the key of a delivery is not named."""


def test_every_kind_of_effect_has_its_key_here():
    assert set(KINDS) == {kind.KIND for kind in get_args(Effect)}


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize("kind", KINDS)
async def test_the_recorder_finds_each_tenants_rows_by_the_index(crowd, kind, mode):
    batch = batch_of([effects(tenant(n), Names(str(job(n, 3)), 3), "m", 2**40) for n in range(50)], [kind])
    async with plans_of(crowd, mode) as plans:
        await TenantContext.set(plans.connection, PLATFORM)
        nodes = await plans.of(queries.PROJECT_BATCH, batch)
    keys = [key for node in nodes for key in node.get("Conflict Arbiter Indexes", ())]
    assert set(keys) == {KINDS[kind]}
    for node in scans_of_tables(nodes):
        assert_found_by_the_tenant(node)


RETENTION = {name: text for name, text in vars(queries).items() if name.startswith("DELETE_OLD_")}


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize("name", RETENTION)
async def test_what_is_past_its_retention_is_found_by_the_tenant(crowd, name, mode):
    async with plans_of(crowd, mode) as plans:
        await TenantContext.set(plans.connection, tenant(7))
        await plans.connection.execute(queries.BECOME_JANITOR)
        limits = (500, 50_000)[: RETENTION[name].count("LIMIT $2") + RETENTION[name].count("<= $3")]
        scans = scans_of_tables(await plans.of(RETENTION[name], tenant(7), *limits))
    assert scans
    for node in scans:
        assert_found_by_the_tenant(node)


async def test_what_is_erased_is_found_by_the_tenant(crowd):
    async with owner_of(crowd) as owner:
        await owner.execute(
            "INSERT INTO erasures (tenant_id, root_id, version, asked_by) VALUES ($1, $1, 2, 'a')", tenant(7)
        )
    async with plans_of(crowd, "auto") as plans:
        await plans.connection.execute(queries.BECOME_ERASER)
        await plans.connection.fetch(queries.ENTER_ERASURE, tenant(7))
        tables = await plans.connection.fetch(queries.TABLES_TO_ERASE, tenant(7))
        assert len(tables) > 15
        for schema, table, _ in tables:
            for statement in (queries.ERASE_ROWS, queries.COUNT_TENANT_ROWS):
                made = await plans.connection.fetchval(queries.FORMAT, statement, [schema, table, tenant(7), "1000"])
                scans = [node for node in scans_of_tables(await plans.of(made)) if node["Node Type"] != "Tid Scan"]
                assert scans
                for node in scans:
                    assert_found_by_the_tenant(node)
