"""Nothing that decides who sees what stands in the database without having been reviewed.

After a migration that is meant to change it: SETTLER_REVIEW=1 writes the file anew, and its difference is reviewed.
"""

from __future__ import annotations

import os

import pytest

from settler_streams.adapters.postgres.catalogue import violations
from settler_streams.adapters.postgres.inventory import REVIEWED, differences, inventory

pytestmark = pytest.mark.services


async def test_the_live_database_is_the_reviewed_one(owner):
    if os.environ.get("SETTLER_REVIEW"):
        REVIEWED.write_text("\n".join(await inventory(owner)) + "\n")
    assert await differences(owner) == []


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        ("CREATE TABLE later (tenant_id uuid PRIMARY KEY)", "table later of owner: row security f"),
        ("CREATE MATERIALIZED VIEW later AS SELECT 1", "materialised view later"),
        ("CREATE SEQUENCE later", "sequence later"),
        ("CREATE TABLE later () INHERITS (jobs)", "inheritance later of jobs"),
        ("GRANT SELECT (event) ON outbox TO settler_services", "grant SELECT (event) on outbox to settler_services"),
        ("GRANT USAGE ON SEQUENCE outbox_id_seq TO PUBLIC", "grant USAGE on outbox_id_seq to PUBLIC"),
        ("GRANT CREATE ON SCHEMA public TO PUBLIC", "grant CREATE on schema of the tables to PUBLIC"),
        ("DO $$BEGIN EXECUTE format('GRANT TEMPORARY ON DATABASE %I TO PUBLIC', current_database()); END$$",
         "grant TEMPORARY on database to PUBLIC"),
        ("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC", "default grant of owner in every schema: SELECT"),
        ("GRANT EXECUTE ON FUNCTION pg_read_file(text) TO PUBLIC", "system pg_read_file(text): EXECUTE to PUBLIC"),
        ("GRANT SELECT ON pg_authid TO settler_services", "system pg_authid: SELECT to settler_services"),
        ("GRANT SET ON PARAMETER session_replication_role TO settler_services", "grant SET on parameter session_rep"),
        ("CREATE EXTENSION dblink", "extension dblink"),
        ("CREATE PUBLICATION later FOR ALL TABLES", "publication later"),
        ("ALTER FUNCTION instant(bigint) LEAKPROOF", "function instant(bigint) of owner in sql: security"),
        ("ALTER FUNCTION register_slug() RESET search_path", "function register_slug() of owner"),
        ("ALTER TABLE tenants DISABLE TRIGGER register_slug", "trigger register_slug (D)"),
        ("CREATE RULE later AS ON DELETE TO jobs DO INSTEAD NOTHING", "rule later on jobs"),
        ("ALTER DATABASE DBNAME SET app.tenant_id = 'x'", "setting of PUBLIC: app.tenant_id=x"),
    ],
)  # fmt: skip
async def test_whatever_is_added_is_named(owner, change, noticed):
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(change.replace("DBNAME", await owner.fetchval("SELECT current_database()")))
        assert any(line.startswith(noticed) and "not reviewed" in line for line in await differences(owner))
    finally:
        await transaction.rollback()


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        ("GRANT settler_relay TO settler_app WITH INHERIT TRUE", "a group is joined as was intended: settler_app in"),
        ("GRANT settler_services TO settler_app WITH SET TRUE", "a group is joined as was intended: settler_app in"),
        ("GRANT pg_read_all_data TO settler_services", "a group is joined as was intended: settler_services in"),
        ("CREATE TABLE later () INHERITS (jobs)", "no inheritance reaches across tables: later"),
        (
            "ALTER POLICY tenant_rows_only ON jobs USING (current_setting('app.tenant_id', true) <> '')",
            "a tenant's policies say that and nothing more: jobs.tenant_rows_only",
        ),
    ],
)
async def test_rules_hold_for_what_nobody_has_reviewed_yet(owner, change, noticed):
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(change)
        found = await violations(owner)
        assert any(line.startswith(noticed) and "; " in line for line in found)
    finally:
        await transaction.rollback()
