-- A batch in a statement for each kind of row, not one for each tenant: preparing a statement costs more than its rows.
-- For tables whose policies compare with the setting itself (0021); a sub-select would be the first row's context for all.
--
-- Each row is still written in its own tenant's context: the value of its tenant column is the context that was set for
-- it. PostgreSQL makes a row, checks it against the policies and writes it before it makes the next one. Were it
-- otherwise, the context would be another row's and the policies would refuse this one.

CREATE FUNCTION in_context_of(tenant uuid) RETURNS uuid
LANGUAGE sql VOLATILE
RETURN set_config('app.tenant_id', tenant::text, true)::uuid;

CREATE FUNCTION by_tenant(batch jsonb, kind text) RETURNS TABLE (tenant uuid, effects jsonb)
LANGUAGE sql IMMUTABLE
BEGIN ATOMIC
    SELECT key::uuid, value -> kind FROM jsonb_each(batch);
END;

DROP FUNCTION project_job_decisions(uuid, jsonb), project_job_results(uuid, jsonb), project_executions(uuid, jsonb),
    project_usage(uuid, jsonb), project_quota_usage(uuid, jsonb), project_signals(uuid, jsonb),
    project_audit_entries(uuid, jsonb), project_dead_letters(uuid, jsonb);

-- As before in all else: the newest effect of a key in the batch, if it is newer than what is stored; row by row in one
-- order, so that two recorders meet their row locks in the same one.

CREATE FUNCTION project_job_decisions(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO jobs AS stored (tenant_id, job_id, kind, priority, decision, reason, current_usage, limit_value,
                                retry_after_ms, requested_at, decided_at, decision_version)
    SELECT in_context_of(e.tenant), e.job_id, e.kind, e.priority, e.decision, e.reason, e.current_usage,
           e.limit_value, e.retry_after_ms, instant(e.requested_at_ms), instant(e.decided_at_ms), e.source_version
    FROM (
        SELECT DISTINCT ON (b.tenant, e.job_id) b.tenant, e.*
        FROM by_tenant(batch, 'job_decision') AS b, jsonb_to_recordset(b.effects) AS e (
            job_id uuid, kind text, priority text, decision text, reason text, current_usage bigint, limit_value bigint,
            retry_after_ms bigint, requested_at_ms bigint, decided_at_ms bigint, source_version bigint)
        ORDER BY b.tenant, e.job_id, e.source_version DESC
    ) AS e
    ON CONFLICT (tenant_id, job_id) DO UPDATE
    SET kind = excluded.kind, priority = excluded.priority, decision = excluded.decision, reason = excluded.reason,
        current_usage = excluded.current_usage, limit_value = excluded.limit_value,
        retry_after_ms = excluded.retry_after_ms, requested_at = excluded.requested_at,
        decided_at = excluded.decided_at, decision_version = excluded.decision_version
    WHERE excluded.decision_version > coalesce(stored.decision_version, -1);
END
$$;

CREATE FUNCTION project_job_results(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO jobs AS stored (tenant_id, job_id, outcome, accepted_attempt, finished_at, result_version)
    SELECT in_context_of(e.tenant), e.job_id, e.outcome, e.accepted_attempt, instant(e.finished_at_ms),
           e.source_version
    FROM (
        SELECT DISTINCT ON (b.tenant, e.job_id) b.tenant, e.*
        FROM by_tenant(batch, 'job_result') AS b, jsonb_to_recordset(b.effects) AS e (
            job_id uuid, outcome text, accepted_attempt integer, finished_at_ms bigint, source_version bigint)
        ORDER BY b.tenant, e.job_id, e.source_version DESC
    ) AS e
    ON CONFLICT (tenant_id, job_id) DO UPDATE
    SET outcome = excluded.outcome, accepted_attempt = excluded.accepted_attempt,
        finished_at = excluded.finished_at, result_version = excluded.result_version
    WHERE excluded.result_version > coalesce(stored.result_version, -1);
END
$$;

CREATE FUNCTION project_executions(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO executions AS stored (tenant_id, job_id, attempt, executor, status, started_at, finished_at,
                                      worker_us, error, source_version)
    SELECT in_context_of(e.tenant), e.job_id, e.attempt, e.executor, e.status, instant(e.started_at_ms),
           instant(e.finished_at_ms), e.worker_us, e.error, e.source_version
    FROM (
        SELECT DISTINCT ON (b.tenant, e.job_id, e.attempt) b.tenant, e.*
        FROM by_tenant(batch, 'execution') AS b, jsonb_to_recordset(b.effects) AS e (
            job_id uuid, attempt integer, executor text, status text, started_at_ms bigint, finished_at_ms bigint,
            worker_us bigint, error text, source_version bigint)
        ORDER BY b.tenant, e.job_id, e.attempt, e.source_version DESC
    ) AS e
    ON CONFLICT (tenant_id, job_id, attempt) DO UPDATE
    SET executor = excluded.executor, status = excluded.status, started_at = excluded.started_at,
        finished_at = excluded.finished_at, worker_us = excluded.worker_us, error = excluded.error,
        source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_usage(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO tenant_usage AS stored (tenant_id, resource, window_start, window_seconds, quantity, source_version)
    SELECT in_context_of(e.tenant), e.resource, instant(e.window_start_ms), e.window_seconds, e.quantity,
           e.source_version
    FROM (
        SELECT DISTINCT ON (b.tenant, e.resource, e.window_start_ms, e.window_seconds) b.tenant, e.*
        FROM by_tenant(batch, 'usage') AS b, jsonb_to_recordset(b.effects) AS e (
            resource text, window_start_ms bigint, window_seconds integer, quantity bigint, source_version bigint)
        ORDER BY b.tenant, e.resource, e.window_start_ms, e.window_seconds, e.source_version DESC
    ) AS e
    ON CONFLICT (tenant_id, resource, window_start, window_seconds) DO UPDATE
    SET quantity = excluded.quantity, source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_quota_usage(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO tenant_quota_usage AS stored (tenant_id, quota_type, used, reserved, limit_value, window_end,
                                              source_version)
    SELECT in_context_of(e.tenant), e.quota_type, e.used, e.reserved, e.limit_value, instant(e.window_end_ms),
           e.source_version
    FROM (
        SELECT DISTINCT ON (b.tenant, e.quota_type) b.tenant, e.*
        FROM by_tenant(batch, 'quota_usage') AS b, jsonb_to_recordset(b.effects) AS e (
            quota_type text, used bigint, reserved bigint, limit_value bigint, window_end_ms bigint,
            source_version bigint)
        ORDER BY b.tenant, e.quota_type, e.source_version DESC
    ) AS e
    ON CONFLICT (tenant_id, quota_type) DO UPDATE
    SET used = excluded.used, reserved = excluded.reserved, limit_value = excluded.limit_value,
        window_end = excluded.window_end, source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_signals(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO tenant_signals AS stored (tenant_id, signal_id, kind, resource, detail, signalled_at, source_version)
    SELECT in_context_of(e.tenant), e.signal_id, e.kind, e.resource, e.detail, instant(e.signalled_at_ms),
           e.source_version
    FROM (
        SELECT DISTINCT ON (b.tenant, e.signal_id) b.tenant, e.*
        FROM by_tenant(batch, 'signal') AS b, jsonb_to_recordset(b.effects) AS e (
            signal_id uuid, kind text, resource text, detail jsonb, signalled_at_ms bigint, source_version bigint)
        ORDER BY b.tenant, e.signal_id, e.source_version DESC
    ) AS e
    ON CONFLICT (tenant_id, signal_id) DO UPDATE
    SET kind = excluded.kind, resource = excluded.resource, detail = excluded.detail,
        signalled_at = excluded.signalled_at, source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION project_audit_entries(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO audit_logs (tenant_id, id, actor, action, subject, before, after, request_id, recorded_at)
    SELECT in_context_of(e.tenant), e.id, e.actor, e.action, e.subject, e.before, e.after, e.request_id,
           instant(e.recorded_at_ms)
    FROM (
        SELECT b.tenant, e.*
        FROM by_tenant(batch, 'audit_entry') AS b, jsonb_to_recordset(b.effects) AS e (
            id uuid, actor text, action text, subject text, before jsonb, after jsonb, request_id text,
            recorded_at_ms bigint)
        ORDER BY b.tenant, e.id
    ) AS e
    ON CONFLICT (tenant_id, id) DO NOTHING;
END
$$;

CREATE FUNCTION project_dead_letters(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO dead_letters (tenant_id, letter_partition, letter_offset, role, reason, detail, origin_topic,
                              origin_partition, origin_offset, attempts, refused_at)
    SELECT in_context_of(e.tenant), e.letter_partition, e.letter_offset, e.role, e.reason, e.detail, e.origin_topic,
           e.origin_partition, e.origin_offset, e.attempts, instant(e.refused_at_ms)
    FROM (
        SELECT b.tenant, e.*
        FROM by_tenant(batch, 'dead_letter') AS b, jsonb_to_recordset(b.effects) AS e (
            letter_partition integer, letter_offset bigint, role text, reason text, detail text, origin_topic text,
            origin_partition integer, origin_offset bigint, attempts integer, refused_at_ms bigint)
        ORDER BY b.tenant, e.letter_partition, e.letter_offset
    ) AS e
    ON CONFLICT (tenant_id, letter_partition, letter_offset) DO NOTHING;
END
$$;

-- As before: locks in one order before the look, what comes late of an erased tenant is passed over, and the rows of a
-- tenant with a schema of its own go there.
CREATE OR REPLACE FUNCTION project_batch(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    before text := current_setting('app.tenant_id', true);
    path_before text := current_setting('search_path');
    path text := path_before;
    paths text[];
    parts jsonb[];
    kinds text[] := ARRAY(SELECT DISTINCT jsonb_object_keys(value) FROM jsonb_each(batch));
    effects_of record;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(tenant_lock(tenant))
    FROM (SELECT key::uuid AS tenant FROM jsonb_object_keys(batch) AS key ORDER BY 1) AS of_batch;
    PERFORM set_config('app.tenant_id', '00000000-0000-0000-0000-000000000000', true);
    SELECT array_agg(place.path ORDER BY place.path), array_agg(place.part ORDER BY place.path)
    INTO paths, parts
    FROM (
        SELECT concat(quote_ident(own.schema_name) || ', ', 'public, pg_temp') AS path,
               jsonb_object_agg(key, value) AS part
        FROM jsonb_each(batch)
        LEFT JOIN public.tenant_schemas AS own ON own.tenant_id = key::uuid
        WHERE NOT EXISTS (SELECT FROM public.erasures WHERE tenant_id = key::uuid)
        GROUP BY 1
    ) AS place;

    FOR i IN 1 .. coalesce(cardinality(parts), 0) LOOP
        IF path <> paths[i] THEN
            path := set_config('search_path', paths[i], true);
        END IF;
        IF 'job_decision' = ANY (kinds) THEN PERFORM project_job_decisions(parts[i]); END IF;
        IF 'job_result' = ANY (kinds) THEN PERFORM project_job_results(parts[i]); END IF;
        IF 'execution' = ANY (kinds) THEN PERFORM project_executions(parts[i]); END IF;
        IF 'usage' = ANY (kinds) THEN PERFORM project_usage(parts[i]); END IF;
        IF 'quota_usage' = ANY (kinds) THEN PERFORM project_quota_usage(parts[i]); END IF;
        IF 'signal' = ANY (kinds) THEN PERFORM project_signals(parts[i]); END IF;
        IF 'audit_entry' = ANY (kinds) THEN PERFORM project_audit_entries(parts[i]); END IF;
        IF 'dead_letter' = ANY (kinds) THEN PERFORM project_dead_letters(parts[i]); END IF;
        -- Flags' policies read the context once a statement (0005), and webhooks' queues are looked at tenant by tenant.
        IF 'flag' = ANY (kinds) THEN
            FOR effects_of IN SELECT * FROM by_tenant(parts[i], 'flag') WHERE effects IS NOT NULL ORDER BY tenant LOOP
                PERFORM project_flags(in_context_of(effects_of.tenant), effects_of.effects);
            END LOOP;
        END IF;
        IF 'webhook_event' = ANY (kinds) THEN
            FOR effects_of IN
                SELECT * FROM by_tenant(parts[i], 'webhook_event') WHERE effects IS NOT NULL ORDER BY tenant
            LOOP
                PERFORM queue_webhook_deliveries(in_context_of(effects_of.tenant), effects_of.effects);
            END LOOP;
        END IF;
    END LOOP;
    PERFORM set_config('app.tenant_id', coalesce(before, ''), true);
    PERFORM set_config('search_path', path_before, true);
END
$$;

GRANT EXECUTE ON FUNCTION
    in_context_of(uuid), by_tenant(jsonb, text),
    project_job_decisions(jsonb), project_job_results(jsonb), project_executions(jsonb), project_usage(jsonb),
    project_quota_usage(jsonb), project_signals(jsonb), project_audit_entries(jsonb),
    project_dead_letters(jsonb)
TO settler_services;
