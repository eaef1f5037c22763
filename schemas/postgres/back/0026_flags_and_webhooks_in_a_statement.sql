-- Undoes 0026: the functions as 0008, 0011 and 0023 have them, the policies as 0005, 0011 and 0019.
ALTER POLICY tenant_rows ON feature_flags
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
CREATE POLICY platform_rows ON feature_flags FOR SELECT
    USING (tenant_id = '00000000-0000-0000-0000-000000000000'
           AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) IS NOT NULL);
ALTER POLICY tenant_rows_only ON feature_flags
    USING (tenant_id IN ((SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid),
                         '00000000-0000-0000-0000-000000000000')
           AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) IS NOT NULL);
ALTER POLICY tenant_rows_only_insert ON feature_flags
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
ALTER POLICY tenant_rows_only_update ON feature_flags
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
ALTER POLICY tenant_rows_only_delete ON feature_flags
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
ALTER POLICY tenant_rows ON webhook_lanes
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
CREATE POLICY courier_rows ON webhook_lanes TO settler_courier
    USING ((SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) = '00000000-0000-0000-0000-000000000000')
    WITH CHECK (
        (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) = '00000000-0000-0000-0000-000000000000');
ALTER POLICY tenant_rows_only ON webhook_lanes
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           OR (current_user = 'settler_courier'
               AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                   = '00000000-0000-0000-0000-000000000000'))
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                OR (current_user = 'settler_courier'
                    AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                        = '00000000-0000-0000-0000-000000000000'));

DROP FUNCTION project_flags(jsonb), open_webhooks(uuid), queue_webhook_deliveries(jsonb);

CREATE FUNCTION project_flags(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO feature_flags AS stored (tenant_id, flag, scope, user_id, enabled, killed, definition, removed,
                                         changed_by, changed_at, source_version)
    SELECT DISTINCT ON (e.flag, e.scope, e.user_id)
           tenant, e.flag, e.scope, e.user_id, e.enabled, e.killed, e.definition, e.removed,
           e.changed_by, instant(e.changed_at_ms), e.source_version
    FROM jsonb_to_recordset(effects) AS e (
        flag text, scope text, user_id text, enabled boolean, killed boolean, definition jsonb, removed boolean,
        changed_by text, changed_at_ms bigint, source_version bigint)
    ORDER BY e.flag, e.scope, e.user_id, e.source_version DESC
    ON CONFLICT (tenant_id, flag, scope, user_id) DO UPDATE
    SET enabled = excluded.enabled, killed = excluded.killed, definition = excluded.definition,
        removed = excluded.removed, changed_by = excluded.changed_by, changed_at = excluded.changed_at,
        source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

CREATE FUNCTION queue_webhook_deliveries(tenant uuid, effects jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    queued_max CONSTANT bigint := 50000;
BEGIN
    IF NOT EXISTS (SELECT FROM webhooks WHERE tenant_id = tenant AND status <> 'disabled') THEN
        RETURN;  -- most tenants have none
    END IF;
    -- Locked against deletion, so that none vanishes before its deliveries are in.
    WITH open_webhooks AS MATERIALIZED (
        SELECT id, event_types, created_at - interval '1 minute' AS wants_from
        FROM webhooks WHERE tenant_id = tenant AND status <> 'disabled' ORDER BY id FOR KEY SHARE
    ), room AS MATERIALIZED (
        SELECT w.id, queued_max - (
            SELECT count(*) FROM (
                SELECT FROM webhook_deliveries d
                WHERE d.tenant_id = tenant AND d.webhook_id = w.id AND d.status = 'pending' LIMIT queued_max) AS queued
        ) AS free FROM open_webhooks w
    ), wanted AS MATERIALIZED (
        SELECT w.id, e.event_id, e.event_type, e.body,
               row_number() OVER (PARTITION BY w.id ORDER BY e.source_version) AS place
        FROM jsonb_to_recordset(effects) AS e (
            event_id uuid, event_type text, body text, appended_at_ms bigint, source_version bigint)
        JOIN open_webhooks w ON w.wants_from <= instant(e.appended_at_ms)
                            AND (w.event_types = '{}' OR e.event_type = ANY (w.event_types))
    ), queued AS (
        INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body, next_attempt_at)
        SELECT tenant, wanted.id, event_id, event_type, body, clock_timestamp()
        FROM wanted JOIN room USING (id) WHERE place <= free
        ORDER BY wanted.id, place
        ON CONFLICT (tenant_id, webhook_id, event_id) DO NOTHING
    )
    UPDATE webhook_lanes AS lane
    SET due_at = LEAST(lane.due_at, now()), skipped = lane.skipped + GREATEST(0, counted.wanted - room.free)
    FROM (SELECT id, count(*) AS wanted FROM wanted GROUP BY id) AS counted JOIN room USING (id)
    WHERE lane.tenant_id = tenant AND lane.webhook_id = counted.id;
END
$$;

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

GRANT EXECUTE ON FUNCTION project_flags(uuid, jsonb), queue_webhook_deliveries(uuid, jsonb) TO settler_services;
