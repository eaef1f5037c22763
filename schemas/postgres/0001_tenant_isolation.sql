-- What every tenant table has in common, said once.
--
-- The roles are made by the migration runner, because roles belong to the cluster and not to one database:
--   settler_services  no login; holds the privileges of the services. DB_APP_USER is a member and inherits them.
--   settler_relay     no login; reads and empties the outbox. DB_APP_USER can switch to it and inherits nothing.
-- Neither owns anything, and neither may bypass row-level security.
--
-- Tables are named without a schema: the runner sets the search path, so one set of files can fill any schema.

-- A new function is callable by nobody until a GRANT says so.
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON ROUTINES FROM PUBLIC;

GRANT SELECT ON schema_migrations TO settler_services;

-- Puts `guarded` under row-level security: a row is visible, and may be written, only in the context of its tenant.
--
-- FORCE binds the owner as well. The sub-select makes the context an init plan, read once per statement and not once
-- per row. After a SET LOCAL has ended the setting is '' and not NULL, hence NULLIF: no context, no rows.
-- Permissive policies are OR-ed, so a careless later one could only widen; the restrictive twin is AND-ed to all of
-- them and keeps what it says.
CREATE PROCEDURE protect_tenant_table(guarded regclass, tenant_column name DEFAULT 'tenant_id')
LANGUAGE plpgsql
AS $$
DECLARE
    own_row text := format(
        '%I = (SELECT NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid)', tenant_column);
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', guarded);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', guarded);
    EXECUTE format('CREATE POLICY tenant_rows ON %1$s USING (%2$s) WITH CHECK (%2$s)', guarded, own_row);
    EXECUTE format(
        'CREATE POLICY tenant_rows_only ON %1$s AS RESTRICTIVE USING (%2$s) WITH CHECK (%2$s)', guarded, own_row);
END
$$;
