-- scope: tenant
-- Undoes 0016: nobody is erased any more. Run in each tenant's own schema, then in the shared one.

DO $migration$
DECLARE
    guarded name;
BEGIN
    FOR guarded IN
        SELECT c.relname FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
        WHERE c.relnamespace = current_schema()::regnamespace AND p.polname = 'under_erasure' AND c.relname <> 'erasures'
        ORDER BY 1
    LOOP
        EXECUTE format('DROP POLICY under_erasure ON %I', guarded);
        EXECUTE format('REVOKE SELECT, DELETE ON %I FROM settler_eraser', guarded);
    END LOOP;

    IF current_schema() <> 'public' THEN
        EXECUTE format('REVOKE USAGE ON SCHEMA %I FROM settler_eraser', current_schema());
        RETURN;
    END IF;

    REVOKE SELECT ON tenants, tenant_schemas FROM settler_eraser;
    REVOKE INSERT ON outbox FROM settler_eraser;
    REVOKE EXECUTE ON FUNCTION tenant_lock(uuid), enter_tenant(uuid) FROM settler_eraser;
    DROP FUNCTION forget_tenant(), enter_erasure(uuid);

    -- As 0014 has them.
CREATE OR REPLACE FUNCTION enter_tenant(tenant uuid) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    own name;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(public.tenant_lock(tenant));
    PERFORM set_config('app.tenant_id', tenant::text, true);
    SELECT schema_name INTO own FROM public.tenant_schemas WHERE tenant_id = tenant;
    PERFORM set_config('search_path', concat(quote_ident(own) || ', ', 'public, pg_temp'), true);
END
$$;

CREATE OR REPLACE FUNCTION project_batch(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    before text := current_setting('app.tenant_id', true);
    path text := current_setting('search_path');
    tenant uuid;
    effects jsonb;
BEGIN
    FOR tenant, effects IN SELECT key::uuid, value FROM jsonb_each(batch) ORDER BY 1 LOOP
        PERFORM enter_tenant(tenant);
        IF effects ? 'job_decision' THEN PERFORM project_job_decisions(tenant, effects -> 'job_decision'); END IF;
        IF effects ? 'job_result' THEN PERFORM project_job_results(tenant, effects -> 'job_result'); END IF;
        IF effects ? 'execution' THEN PERFORM project_executions(tenant, effects -> 'execution'); END IF;
        IF effects ? 'usage' THEN PERFORM project_usage(tenant, effects -> 'usage'); END IF;
        IF effects ? 'quota_usage' THEN PERFORM project_quota_usage(tenant, effects -> 'quota_usage'); END IF;
        IF effects ? 'signal' THEN PERFORM project_signals(tenant, effects -> 'signal'); END IF;
        IF effects ? 'flag' THEN PERFORM project_flags(tenant, effects -> 'flag'); END IF;
        IF effects ? 'audit_entry' THEN PERFORM project_audit_entries(tenant, effects -> 'audit_entry'); END IF;
        IF effects ? 'dead_letter' THEN PERFORM project_dead_letters(tenant, effects -> 'dead_letter'); END IF;
        IF effects ? 'webhook_event' THEN PERFORM queue_webhook_deliveries(tenant, effects -> 'webhook_event'); END IF;
    END LOOP;
    PERFORM set_config('app.tenant_id', coalesce(before, ''), true);
    PERFORM set_config('search_path', path, true);
END
$$;

CREATE OR REPLACE FUNCTION tenant_tables(of_schema name) RETURNS SETOF oid
LANGUAGE sql STABLE
AS $$
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = of_schema AND c.relkind IN ('r', 'p')
      AND c.relname NOT IN ('outbox', 'feature_flags', 'tenant_schemas', 'tenant_slugs', 'webhook_lanes')
      AND EXISTS (SELECT FROM pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped)
$$;

CREATE OR REPLACE FUNCTION create_tenant_schema() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    tenant uuid := NULLIF(current_setting('app.tenant_id', true), '')::uuid;
    own name := 't_' || replace(tenant::text, '-', '');
    layout text[] := ARRAY(SELECT tenant_layout('public'));
    statement text;
BEGIN
    INSERT INTO tenant_schemas (tenant_id, schema_name, layout)
    SELECT tenant, own, max(version) FROM schema_migrations;
    EXECUTE format('CREATE SCHEMA %I', own);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO settler_services, settler_janitor', own);
    PERFORM set_config('search_path', quote_ident(own) || ', public, pg_temp', true);
    FOREACH statement IN ARRAY layout LOOP
        EXECUTE statement;
    END LOOP;
END
$$;

-- As 0001 has it.
CREATE OR REPLACE PROCEDURE protect_tenant_table(guarded regclass, tenant_column name DEFAULT 'tenant_id')
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

    DROP FUNCTION open_tenant(uuid);
    DROP TABLE erasures;
    DROP FUNCTION due_for_erasure(), being_erased();
END
$migration$;
