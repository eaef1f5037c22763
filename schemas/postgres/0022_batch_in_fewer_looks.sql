-- Where the rows of a batch go is looked up once for all its tenants, not tenant by tenant.

-- So the platform sees who has a schema of its own and who was erased. Nothing else of a tenant, and nothing to change:
-- the services may only read these two tables.
ALTER POLICY tenant_rows_only ON tenant_schemas USING (
    tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid
    OR NULLIF(current_setting('app.tenant_id', true), '')::uuid = '00000000-0000-0000-0000-000000000000');
ALTER POLICY tenant_rows_only ON erasures USING (
    tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid
    OR NULLIF(current_setting('app.tenant_id', true), '')::uuid = '00000000-0000-0000-0000-000000000000');

-- As before: each tenant's effects are written in its own context, and what comes late of an erased one is passed over.
-- The locks come before the look, in one order: nobody in the batch is moved, or begins to be erased, until it is written.
CREATE OR REPLACE FUNCTION project_batch(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    before text := current_setting('app.tenant_id', true);
    path_before text := current_setting('search_path');
    path text := path_before;
    tenants uuid[];
    paths text[];
    effects jsonb;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(tenant_lock(tenant))
    FROM (SELECT key::uuid AS tenant FROM jsonb_object_keys(batch) AS key ORDER BY 1) AS of_batch;
    PERFORM set_config('app.tenant_id', '00000000-0000-0000-0000-000000000000', true);
    SELECT array_agg(key::uuid ORDER BY key::uuid),
           array_agg(concat(quote_ident(own.schema_name) || ', ', 'public, pg_temp') ORDER BY key::uuid)
    INTO tenants, paths
    FROM jsonb_object_keys(batch) AS key
    LEFT JOIN public.tenant_schemas AS own ON own.tenant_id = key::uuid
    WHERE NOT EXISTS (SELECT FROM public.erasures WHERE tenant_id = key::uuid);

    FOR i IN 1 .. coalesce(cardinality(tenants), 0) LOOP
        PERFORM set_config('app.tenant_id', tenants[i]::text, true);
        IF path <> paths[i] THEN
            path := set_config('search_path', paths[i], true);
        END IF;
        effects := batch -> tenants[i]::text;
        IF effects ? 'job_decision' THEN PERFORM project_job_decisions(tenants[i], effects -> 'job_decision'); END IF;
        IF effects ? 'job_result' THEN PERFORM project_job_results(tenants[i], effects -> 'job_result'); END IF;
        IF effects ? 'execution' THEN PERFORM project_executions(tenants[i], effects -> 'execution'); END IF;
        IF effects ? 'usage' THEN PERFORM project_usage(tenants[i], effects -> 'usage'); END IF;
        IF effects ? 'quota_usage' THEN PERFORM project_quota_usage(tenants[i], effects -> 'quota_usage'); END IF;
        IF effects ? 'signal' THEN PERFORM project_signals(tenants[i], effects -> 'signal'); END IF;
        IF effects ? 'flag' THEN PERFORM project_flags(tenants[i], effects -> 'flag'); END IF;
        IF effects ? 'audit_entry' THEN PERFORM project_audit_entries(tenants[i], effects -> 'audit_entry'); END IF;
        IF effects ? 'dead_letter' THEN PERFORM project_dead_letters(tenants[i], effects -> 'dead_letter'); END IF;
        IF effects ? 'webhook_event' THEN PERFORM queue_webhook_deliveries(tenants[i], effects -> 'webhook_event'); END IF;
    END LOOP;
    PERFORM set_config('app.tenant_id', coalesce(before, ''), true);
    PERFORM set_config('search_path', path_before, true);
END
$$;
