-- Flags and webhooks of all tenants in a batch in one statement each, as 0023 does for everything else.
--
-- For that their policies compare with the setting itself, and one policy decides, as 0018 and 0020 say.

-- Reading is wider by the platform's own flags, once there is a context; so each command has a policy of its own.
ALTER POLICY tenant_rows ON feature_flags USING (true) WITH CHECK (true);
DROP POLICY platform_rows ON feature_flags;
ALTER POLICY tenant_rows_only ON feature_flags
    USING (tenant_id IN (NULLIF(current_setting('app.tenant_id', true), '')::uuid,
                         '00000000-0000-0000-0000-000000000000')
           AND NULLIF(current_setting('app.tenant_id', true), '')::uuid IS NOT NULL);
ALTER POLICY tenant_rows_only_insert ON feature_flags
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
ALTER POLICY tenant_rows_only_update ON feature_flags
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
ALTER POLICY tenant_rows_only_delete ON feature_flags
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);

-- A courier sees all lanes, as 0011 says; the policy that lets it lets nobody else.
ALTER POLICY tenant_rows ON webhook_lanes USING (true) WITH CHECK (true);
DROP POLICY courier_rows ON webhook_lanes;
ALTER POLICY tenant_rows_only ON webhook_lanes
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid
           OR (current_user = 'settler_courier'
               AND NULLIF(current_setting('app.tenant_id', true), '')::uuid
                   = '00000000-0000-0000-0000-000000000000'))
    WITH CHECK (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid
                OR (current_user = 'settler_courier'
                    AND NULLIF(current_setting('app.tenant_id', true), '')::uuid
                        = '00000000-0000-0000-0000-000000000000'));

DROP FUNCTION project_flags(uuid, jsonb), queue_webhook_deliveries(uuid, jsonb);

CREATE FUNCTION project_flags(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO feature_flags AS stored (tenant_id, flag, scope, user_id, enabled, killed, definition, removed,
                                         changed_by, changed_at, source_version)
    SELECT in_context_of(e.tenant), e.flag, e.scope, e.user_id, e.enabled, e.killed, e.definition, e.removed,
           e.changed_by, instant(e.changed_at_ms), e.source_version
    FROM (
        SELECT DISTINCT ON (b.tenant, e.flag, e.scope, e.user_id) b.tenant, e.*
        FROM by_tenant(batch, 'flag') AS b, jsonb_to_recordset(b.effects) AS e (
            flag text, scope text, user_id text, enabled boolean, killed boolean, definition jsonb, removed boolean,
            changed_by text, changed_at_ms bigint, source_version bigint)
        ORDER BY b.tenant, e.flag, e.scope, e.user_id, e.source_version DESC
    ) AS e
    ON CONFLICT (tenant_id, flag, scope, user_id) DO UPDATE
    SET enabled = excluded.enabled, killed = excluded.killed, definition = excluded.definition,
        removed = excluded.removed, changed_by = excluded.changed_by, changed_at = excluded.changed_at,
        source_version = excluded.source_version
    WHERE excluded.source_version > stored.source_version;
END
$$;

-- A tenant's webhooks that are not disabled, from when on each wants events, and how many more its queue holds: 50,000
-- deliveries, at a kilobyte or so each. Most tenants have none. The tenant's context stays set.
--
-- They are locked against deletion, so that none vanishes before its deliveries are in. A minute is how far the
-- broker's clock may differ.
CREATE FUNCTION open_webhooks(tenant uuid)
RETURNS TABLE (webhook_id uuid, event_types text[], wants_from timestamptz, free bigint)
LANGUAGE plpgsql ROWS 1
AS $$
DECLARE
    queued_max CONSTANT bigint := 50000;
    context CONSTANT uuid := in_context_of(tenant);
BEGIN
    RETURN QUERY
    WITH found AS MATERIALIZED (
        SELECT w.id, w.event_types, w.created_at - interval '1 minute' AS wants_from
        FROM webhooks w WHERE w.tenant_id = context AND w.status <> 'disabled' ORDER BY w.id FOR KEY SHARE
    )
    SELECT f.id, f.event_types, f.wants_from, queued_max - (
        SELECT count(*) FROM (
            SELECT FROM webhook_deliveries d
            WHERE d.tenant_id = context AND d.webhook_id = f.id AND d.status = 'pending' LIMIT queued_max) AS queued)
    FROM found f;
END
$$;

-- As before: each event once for each webhook that wants it, in the order of the log; what finds the queue full is
-- counted and passed over; and their lanes are due. One that is due already is only locked: whoever serves it has to
-- wait for this transaction before it looks for what is left.
--
-- Deliveries have one key, so ON CONFLICT need not name it; to name it is to read, for which each row would be checked
-- once more.
CREATE FUNCTION queue_webhook_deliveries(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    WITH opened AS MATERIALIZED (
        SELECT b.tenant, w.*
        FROM (SELECT tenant FROM by_tenant(batch, 'webhook_event') WHERE effects IS NOT NULL ORDER BY tenant) AS b,
             open_webhooks(b.tenant) AS w
    ), events AS MATERIALIZED (  -- of those alone that have webhooks
        SELECT b.tenant, e.*
        FROM by_tenant(batch, 'webhook_event') AS b, jsonb_to_recordset(b.effects) AS e (
            event_id uuid, event_type text, body text, appended_at_ms bigint, source_version bigint)
        WHERE b.tenant IN (SELECT o.tenant FROM opened o)
    ), wanted AS MATERIALIZED (
        SELECT tenant, w.webhook_id, w.free, e.event_id, e.event_type, e.body,
               row_number() OVER (PARTITION BY tenant, w.webhook_id ORDER BY e.source_version) AS place
        FROM opened AS w JOIN events AS e USING (tenant)
        WHERE w.wants_from <= instant(e.appended_at_ms)
          AND (w.event_types = '{}' OR e.event_type = ANY (w.event_types))
    ), queued AS (
        INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body, next_attempt_at)
        SELECT in_context_of(w.tenant), w.webhook_id, w.event_id, w.event_type, w.body, clock_timestamp()
        FROM (SELECT * FROM wanted WHERE place <= free ORDER BY tenant, webhook_id, place) AS w
        ON CONFLICT DO NOTHING
    )
    INSERT INTO webhook_lanes AS lane (tenant_id, webhook_id, due_at, skipped)
    SELECT in_context_of(w.tenant), w.webhook_id, now(), w.skipped
    FROM (
        SELECT tenant, webhook_id, GREATEST(0, count(*) - min(free)) AS skipped
        FROM wanted GROUP BY tenant, webhook_id ORDER BY tenant, webhook_id
    ) AS w
    ON CONFLICT (tenant_id, webhook_id) DO UPDATE
    SET due_at = LEAST(lane.due_at, excluded.due_at), skipped = lane.skipped + excluded.skipped
    WHERE lane.due_at > excluded.due_at OR excluded.skipped > 0;
END
$$;

-- As before, with two kinds more in a statement each.
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
        IF 'flag' = ANY (kinds) THEN PERFORM project_flags(parts[i]); END IF;
        IF 'webhook_event' = ANY (kinds) THEN PERFORM queue_webhook_deliveries(parts[i]); END IF;
    END LOOP;
    PERFORM set_config('app.tenant_id', coalesce(before, ''), true);
    PERFORM set_config('search_path', path_before, true);
END
$$;

GRANT EXECUTE ON FUNCTION project_flags(jsonb), open_webhooks(uuid), queue_webhook_deliveries(jsonb)
TO settler_services;
