-- Undoes 0023: the functions as 0008 and 0022 have them.
DROP FUNCTION project_job_decisions(jsonb), project_job_results(jsonb), project_executions(jsonb), project_usage(jsonb),
    project_quota_usage(jsonb), project_signals(jsonb), project_audit_entries(jsonb),
    project_dead_letters(jsonb);

CREATE FUNCTION project_job_decisions(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO jobs AS stored (tenant_id, job_id, kind, priority, decision, reason, current_usage, limit_value,
                                retry_after_ms, requested_at, decided_at, decision_version)
    SELECT DISTINCT ON (e.job_id)
           tenant, e.job_id, e.kind, e.priority, e.decision, e.reason, e.current_usage, e.limit_value,
           e.retry_after_ms, instant(e.requested_at_ms), instant(e.decided_at_ms), e.source_version
    FROM jsonb_to_recordset(effects) AS e (
        job_id uuid, kind text, priority text, decision text, reason text, current_usage bigint, limit_value bigint,
        retry_after_ms bigint, requested_at_ms bigint, decided_at_ms bigint, source_version bigint)
    ORDER BY e.job_id, e.source_version DESC
    ON CONFLICT (tenant_id, job_id) DO UPDATE
    SET kind = excluded.kind, priority = excluded.priority, decision = excluded.decision, reason = excluded.reason,
        current_usage = excluded.current_usage, limit_value = excluded.limit_value,
        retry_after_ms = excluded.retry_after_ms, requested_at = excluded.requested_at,
        decided_at = excluded.decided_at, decision_version = excluded.decision_version
    WHERE excluded.decision_version > coalesce(stored.decision_version, -1);
END
$$;

CREATE FUNCTION project_job_results(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO jobs AS stored (tenant_id, job_id, outcome, accepted_attempt, finished_at, result_version)
    SELECT DISTINCT ON (e.job_id)
           tenant, e.job_id, e.outcome, e.accepted_attempt, instant(e.finished_at_ms), e.source_version
    FROM jsonb_to_recordset(effects) AS e (
        job_id uuid, outcome text, accepted_attempt integer, finished_at_ms bigint, source_version bigint)
    ORDER BY e.job_id, e.source_version DESC
    ON CONFLICT (tenant_id, job_id) DO UPDATE
    SET outcome = excluded.outcome, accepted_attempt = excluded.accepted_attempt,
        finished_at = excluded.finished_at, result_version = excluded.result_version
    WHERE excluded.result_version > coalesce(stored.result_version, -1);
END
$$;

CREATE FUNCTION project_executions(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO executions AS stored (tenant_id, job_id, attempt, executor, status, started_at, finished_at,
                                      worker_us, error, source_version)
    SELECT DISTINCT ON (e.job_id, e.attempt)
           tenant, e.job_id, e.attempt, e.executor, e.status, instant(e.started_at_ms), instant(e.finished_at_ms),
           e.worker_us, e.error, e.source_version
    FROM jsonb_to_recordset(effects) AS e (
        job_id uuid, attempt integer, executor text, status text, started_at_ms bigint, finished_at_ms bigint,
        worker_us bigint, error text, source_version bigint)
    ORDER BY e.job_id, e.attempt, e.source_version DESC
    ON CONFLICT (tenant_id, job_id, attempt) DO UPDATE
    SET executor = excluded.executor, status = excluded.status, started_at = excluded.started_at,
        finished_at = excluded.finished_at, worker_us = excluded.worker_us, error = excluded.error,
        source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_usage(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO tenant_usage AS stored (tenant_id, resource, window_start, window_seconds, quantity, source_version)
    SELECT DISTINCT ON (e.resource, e.window_start_ms, e.window_seconds)
           tenant, e.resource, instant(e.window_start_ms), e.window_seconds, e.quantity, e.source_version
    FROM jsonb_to_recordset(effects) AS e (
        resource text, window_start_ms bigint, window_seconds integer, quantity bigint, source_version bigint)
    ORDER BY e.resource, e.window_start_ms, e.window_seconds, e.source_version DESC
    ON CONFLICT (tenant_id, resource, window_start, window_seconds) DO UPDATE
    SET quantity = excluded.quantity, source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_quota_usage(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO tenant_quota_usage AS stored (tenant_id, quota_type, used, reserved, limit_value, window_end,
                                              source_version)
    SELECT DISTINCT ON (e.quota_type)
           tenant, e.quota_type, e.used, e.reserved, e.limit_value, instant(e.window_end_ms), e.source_version
    FROM jsonb_to_recordset(effects) AS e (
        quota_type text, used bigint, reserved bigint, limit_value bigint, window_end_ms bigint,
        source_version bigint)
    ORDER BY e.quota_type, e.source_version DESC
    ON CONFLICT (tenant_id, quota_type) DO UPDATE
    SET used = excluded.used, reserved = excluded.reserved, limit_value = excluded.limit_value,
        window_end = excluded.window_end, source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_signals(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO tenant_signals AS stored (tenant_id, signal_id, kind, resource, detail, signalled_at, source_version)
    SELECT DISTINCT ON (e.signal_id)
           tenant, e.signal_id, e.kind, e.resource, e.detail, instant(e.signalled_at_ms), e.source_version
    FROM jsonb_to_recordset(effects) AS e (
        signal_id uuid, kind text, resource text, detail jsonb, signalled_at_ms bigint, source_version bigint)
    ORDER BY e.signal_id, e.source_version DESC
    ON CONFLICT (tenant_id, signal_id) DO UPDATE
    SET kind = excluded.kind, resource = excluded.resource, detail = excluded.detail,
        signalled_at = excluded.signalled_at, source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_audit_entries(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO audit_logs (tenant_id, id, actor, action, subject, before, after, request_id, recorded_at)
    SELECT tenant, e.id, e.actor, e.action, e.subject, e.before, e.after, e.request_id, instant(e.recorded_at_ms)
    FROM jsonb_to_recordset(effects) AS e (
        id uuid, actor text, action text, subject text, before jsonb, after jsonb, request_id text,
        recorded_at_ms bigint)
    ORDER BY e.id
    ON CONFLICT (tenant_id, id) DO NOTHING;
END
$$;

CREATE FUNCTION project_dead_letters(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO dead_letters (tenant_id, letter_partition, letter_offset, role, reason, detail, origin_topic,
                              origin_partition, origin_offset, attempts, refused_at)
    SELECT tenant, e.letter_partition, e.letter_offset, e.role, e.reason, e.detail, e.origin_topic,
           e.origin_partition, e.origin_offset, e.attempts, instant(e.refused_at_ms)
    FROM jsonb_to_recordset(effects) AS e (
        letter_partition integer, letter_offset bigint, role text, reason text, detail text, origin_topic text,
        origin_partition integer, origin_offset bigint, attempts integer, refused_at_ms bigint)
    ORDER BY e.letter_partition, e.letter_offset
    ON CONFLICT (tenant_id, letter_partition, letter_offset) DO NOTHING;
END
$$;

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

GRANT EXECUTE ON FUNCTION
    project_job_decisions(uuid, jsonb), project_job_results(uuid, jsonb), project_executions(uuid, jsonb),
    project_usage(uuid, jsonb), project_quota_usage(uuid, jsonb), project_signals(uuid, jsonb),
    project_audit_entries(uuid, jsonb), project_dead_letters(uuid, jsonb)
TO settler_services;
DROP FUNCTION by_tenant(jsonb, text), in_context_of(uuid);
