"""The catalogue holds every isolation rule, and the lint notices each one that is broken."""

from __future__ import annotations

import pytest

from settler_streams.adapters.postgres.catalogue import violations

pytestmark = pytest.mark.services


async def test_the_migrated_database_isolates_tenants(owner):
    assert await violations(owner) == []


async def test_every_table_of_the_specification_is_there(owner):
    names = {row[0] for row in await owner.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
    assert names == {
        "api_keys", "audit_logs", "dead_letters", "domains", "erasures", "executions", "feature_flags", "jobs",
        "matches", "outbox", "reports",
        "schema_migrations", "stream_positions", "tenant_children", "tenant_quota_usage", "tenant_retention",
        "tenant_schemas",
        "tenant_signals", "tenant_slugs", "tenant_usage", "tenants", "unmatched", "users", "webhook_deliveries",
        "webhook_lanes", "webhooks",
    }  # fmt: skip


BEYOND_ROWS = "no relation is granted to everybody, nor beyond reading and writing rows: "

SOME_CONTEXT = "current_setting('app.tenant_id') <> ''"
"""What every tenant has."""

PROTECTED = (
    "CREATE TABLE later (tenant_id uuid NOT NULL, id uuid, other uuid, amount_minor bigint, "
    "PRIMARY KEY (tenant_id, id)); CALL protect_tenant_table('later');"
)


async def test_a_protected_new_table_is_accepted(owner):
    transaction = owner.transaction()
    await transaction.start()
    await owner.execute(PROTECTED)
    assert await violations(owner) == []
    await transaction.rollback()


@pytest.mark.parametrize(
    ("mutation", "noticed"),
    [
        ("CREATE TABLE later (tenant_id uuid PRIMARY KEY)", "row-level security is enabled and forced: later"),
        ("CREATE TABLE later (id uuid PRIMARY KEY)", "a table belongs to tenants or is known not to: later"),
        ("ALTER TABLE jobs NO FORCE ROW LEVEL SECURITY", "row-level security is enabled and forced: jobs"),
        ("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY", "row-level security is enabled and forced: jobs"),
        ("DROP POLICY tenant_rows ON jobs", "a permissive policy leaves it to the restrictive ones: jobs"),
        (
            "DROP POLICY tenant_rows_only ON jobs",
            "restrictive policies bind every role in every command: jobs (r)",
        ),
        *(
            (
                (
                    f"DROP POLICY tenant_rows_only_{name} ON feature_flags;"
                    f"CREATE POLICY other ON feature_flags AS RESTRICTIVE FOR {name.upper()} {how}"
                ),
                f"a tenant's policies say that and nothing more: feature_flags.tenant_rows_only_{name}",
            )
            for name, how in [
                ("insert", f"WITH CHECK ({SOME_CONTEXT})"),
                ("update", f"USING ({SOME_CONTEXT})"),
                ("delete", f"USING ({SOME_CONTEXT})"),
            ]
        ),
        (
            (
                "DROP POLICY tenant_rows_only ON feature_flags;"
                f"CREATE POLICY tenant_rows_only ON feature_flags AS RESTRICTIVE USING ({SOME_CONTEXT})"
            ),
            "a tenant's policies say that and nothing more: feature_flags.tenant_rows_only",
        ),
        *(
            (
                f"ALTER POLICY {policy} ON {table} {change}",
                f"a tenant's policies say that and nothing more: {table}.{policy}",
            )
            for table, policy, change in [
                ("jobs", "tenant_rows_only", f"USING ({SOME_CONTEXT})"),
                ("feature_flags", "tenant_rows_only", f"USING ({SOME_CONTEXT})"),
                ("feature_flags", "tenant_rows_only_insert", f"WITH CHECK ({SOME_CONTEXT})"),
                ("feature_flags", "tenant_rows_only_update", f"USING ({SOME_CONTEXT})"),
                ("feature_flags", "tenant_rows_only_delete", f"USING ({SOME_CONTEXT})"),
                ("webhook_lanes", "tenant_rows_only", f"USING ({SOME_CONTEXT})"),
                ("webhook_lanes", "tenant_rows_only", f"WITH CHECK ({SOME_CONTEXT})"),
                ("erasures", "tenant_rows_only", f"USING ({SOME_CONTEXT})"),
                ("tenant_schemas", "tenant_rows_only", f"USING ({SOME_CONTEXT})"),
                ("outbox", "tenant_rows", f"USING ({SOME_CONTEXT})"),
                ("outbox", "tenant_rows_only", f"USING ({SOME_CONTEXT})"),
            ]
        ),
        (
            "DROP POLICY tenant_rows_only_update ON feature_flags",
            "restrictive policies bind every role in every command: feature_flags (w)",
        ),
        (
            "ALTER TABLE stream_positions NO FORCE ROW LEVEL SECURITY",
            "positions belong to the platform alone: stream_positions",
        ),
        (
            "DROP POLICY platform_rows ON stream_positions",
            "positions belong to the platform alone: stream_positions",
        ),
        ("CREATE POLICY extra ON jobs USING (true)", "every policy asks for a context: jobs.extra"),
        (
            "CREATE POLICY tenant_rows ON stream_positions USING (true)",
            "every policy asks for a context: stream_positions.tenant_rows",
        ),
        (
            "ALTER POLICY tenant_rows_only ON jobs USING (current_setting('app.tenant_id', true) <> '')",
            "a tenant's policies say that and nothing more: jobs.tenant_rows_only",
        ),
        (
            "ALTER POLICY tenant_rows ON outbox USING (true)",
            "a tenant's policies say that and nothing more: outbox.tenant_rows",
        ),
        (
            "CREATE POLICY extra ON jobs USING (current_setting('app.tenant_id') <> '')",
            "only the relay and the platform widen: jobs.extra",
        ),
        (
            "ALTER TABLE users DROP CONSTRAINT users_pkey CASCADE; ALTER TABLE users ADD PRIMARY KEY (id)",
            "a primary key leads with the tenant: users",
        ),
        ("CREATE UNIQUE INDEX by_email ON users (email)", "an index leads with the tenant: by_email"),
        (
            "CREATE TABLE target (tenant_id uuid, id uuid UNIQUE);"
            + PROTECTED
            + "ALTER TABLE later ADD CONSTRAINT single FOREIGN KEY (other) REFERENCES target (id)",
            "a foreign key carries the tenant: later.single",
        ),
        ("CREATE VIEW peek AS SELECT * FROM jobs", "a view runs as its caller: peek"),
        ("CREATE MATERIALIZED VIEW peek AS SELECT 1", "a table belongs to tenants or is known not to: peek"),
        (
            "CREATE FUNCTION peek() RETURNS bigint LANGUAGE sql SECURITY DEFINER RETURN 1",
            "a definer function is reviewed and pins its search path: peek()",
        ),
        (
            "GRANT EXECUTE ON FUNCTION instant(bigint) TO PUBLIC",
            "no function is callable by everybody: instant(bigint)",
        ),
        (
            "GRANT TRUNCATE ON jobs TO settler_services",
            BEYOND_ROWS + "jobs: TRUNCATE to settler_services",
        ),
        (
            "GRANT SELECT ON jobs TO PUBLIC",
            BEYOND_ROWS + "jobs: SELECT to PUBLIC",
        ),
        (
            "GRANT UPDATE ON audit_logs TO settler_services",
            "audit entries and positions cannot be taken back: audit_logs: UPDATE to settler_services",
        ),
        (
            "GRANT UPDATE (actor) ON audit_logs TO settler_services",
            "audit entries and positions cannot be taken back: audit_logs.actor",
        ),
        ("GRANT SELECT ON tenant_slugs TO settler_services", "row-level security is enabled and forced: tenant_slugs"),
        (
            "ALTER ROLE settler_app BYPASSRLS",
            "the services' roles own nothing and stand above nothing: settler_app",
        ),
        (
            "ALTER ROLE settler_app SUPERUSER",
            "the services' roles own nothing and stand above nothing: settler_app",
        ),
        (
            "GRANT CREATE ON SCHEMA public TO settler_services",
            "the services' roles own nothing and stand above nothing: settler_services",
        ),
        ("ALTER TABLE jobs ADD fee_minor integer", "money is not a float and a time has a zone: jobs.fee_minor"),
        ("ALTER TABLE jobs ADD paid_at timestamp", "money is not a float and a time has a zone: jobs.paid_at"),
        ("ALTER TABLE outbox ALTER tenant_id DROP NOT NULL", "the tenant column is never NULL: outbox"),
    ],
)
async def test_each_broken_rule_is_noticed(owner, mutation, noticed):
    transaction = owner.transaction()
    await transaction.start()
    try:
        if mutation.startswith("ALTER TABLE outbox ALTER"):
            mutation = "ALTER TABLE outbox DROP CONSTRAINT outbox_pkey; " + mutation
        await owner.execute(mutation)
        assert any(found.startswith(f"{noticed}; ") for found in await violations(owner))
    finally:
        await transaction.rollback()
