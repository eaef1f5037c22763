-- Webhooks: secrets under a named key, a queue of deliveries, and whose turn it is.

-- Nothing could write here before: without a key there was no secret to store.
ALTER TABLE webhooks
    ADD COLUMN secret_key_id text NOT NULL,
    -- The secret before the last rotation; it signs beside the new one until that moment.
    ADD COLUMN previous_secret_encrypted bytea,
    ADD COLUMN previous_secret_key_id text,
    ADD COLUMN previous_secret_until timestamptz,
    ADD COLUMN disabled_reason text,
    DROP CONSTRAINT webhooks_status_check,
    ADD CONSTRAINT webhooks_status_check CHECK (status IN ('active', 'paused', 'disabled')),
    ADD CHECK ((status = 'disabled') = (disabled_reason IS NOT NULL)),
    ADD CHECK (num_nonnulls(previous_secret_encrypted, previous_secret_key_id, previous_secret_until) IN (0, 3)),
    ADD CHECK (length(url) <= 2048);

-- One row per webhook and event, whatever becomes of it: the key makes a repeated event find itself. `body` is the
-- CloudEvent as it lay in Kafka, to the byte.
CREATE TABLE webhook_deliveries (
    tenant_id        uuid NOT NULL,
    webhook_id       uuid NOT NULL,
    event_id         uuid NOT NULL,
    event_type       text NOT NULL,
    body             text NOT NULL,
    status           text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'delivered', 'dead')),
    attempts         integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    queued_at        timestamptz NOT NULL DEFAULT now(),
    next_attempt_at  timestamptz NOT NULL DEFAULT now(),
    -- From here on the time runs in which it is tried again; a redrive begins it anew.
    first_attempt_at timestamptz,
    last_attempt_at  timestamptz,
    last_outcome     text,
    last_status      integer,
    finished_at      timestamptz,
    PRIMARY KEY (tenant_id, webhook_id, event_id),
    FOREIGN KEY (tenant_id, webhook_id) REFERENCES webhooks (tenant_id, id) ON DELETE CASCADE,
    CHECK ((status = 'pending') = (finished_at IS NULL))
);
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (tenant_id, webhook_id, next_attempt_at)
    WHERE status = 'pending';
CREATE INDEX webhook_deliveries_by_end ON webhook_deliveries (tenant_id, webhook_id, finished_at)
    WHERE status <> 'pending';
CALL protect_tenant_table('webhook_deliveries');
GRANT SELECT, INSERT, UPDATE, DELETE ON webhook_deliveries TO settler_services;

-- One lane per webhook: when it is due, and who serves it until when. Whoever holds the lease sends alone. It is made and
-- removed in the transactions that make and remove the webhook; no key says so, because lanes are read across tenants
-- and stay together, wherever a tenant's webhooks are.
CREATE TABLE webhook_lanes (
    tenant_id     uuid NOT NULL REFERENCES tenants (id),
    webhook_id    uuid NOT NULL,
    due_at        timestamptz NOT NULL DEFAULT now(),
    lease_id      uuid,
    leased_until  timestamptz NOT NULL DEFAULT '-infinity',
    -- Failures since the last success, and until when the lane pauses for them, whichever delivery is next.
    failures      integer NOT NULL DEFAULT 0 CHECK (failures >= 0),
    paused_until  timestamptz NOT NULL DEFAULT '-infinity',
    failing_since timestamptz,
    -- Events that found the queue full.
    skipped       bigint NOT NULL DEFAULT 0 CHECK (skipped >= 0),
    PRIMARY KEY (tenant_id, webhook_id)
);

-- A courier looks for due lanes across tenants. As with the outbox, that is a role: settler_courier reads this table and
-- takes leases, in the platform's context (nil UUID), and can do nothing else in the database. What is to be sent, where
-- to and with which secret, it then reads in the tenant's own context. The services' login may switch to the role
-- (SET LOCAL ROLE) and does not inherit it.
ALTER TABLE webhook_lanes ENABLE ROW LEVEL SECURITY;
ALTER TABLE webhook_lanes FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_rows ON webhook_lanes
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid))
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
CREATE POLICY courier_rows ON webhook_lanes TO settler_courier
    USING ((SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) = '00000000-0000-0000-0000-000000000000')
    WITH CHECK (
        (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) = '00000000-0000-0000-0000-000000000000');
CREATE POLICY tenant_rows_only ON webhook_lanes AS RESTRICTIVE
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           OR (current_user = 'settler_courier'
               AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                   = '00000000-0000-0000-0000-000000000000'))
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                OR (current_user = 'settler_courier'
                    AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                        = '00000000-0000-0000-0000-000000000000'));
GRANT SELECT, INSERT, UPDATE, DELETE ON webhook_lanes TO settler_services;
GRANT SELECT ON webhook_lanes TO settler_courier;
-- Whose lane it is, and when it is due, is not for the courier to change.
GRANT UPDATE (lease_id, leased_until) ON webhook_lanes TO settler_courier;

-- Queue each event once for each webhook that wants it, and make their lanes due.
--
-- A webhook wants what happened since it was created, give or take a minute by which the broker's clock may differ.
-- A paused one queues; a disabled one does not. A queue holds 50,000 deliveries, at a kilobyte or so each: beyond that
-- the events are counted and passed over.
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
GRANT EXECUTE ON FUNCTION queue_webhook_deliveries(uuid, jsonb) TO settler_services;

-- As before, with one kind more.
CREATE OR REPLACE FUNCTION project_batch(batch jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    before text := current_setting('app.tenant_id', true);
    tenant uuid;
    effects jsonb;
BEGIN
    FOR tenant, effects IN SELECT key::uuid, value FROM jsonb_each(batch) ORDER BY 1 LOOP
        PERFORM set_config('app.tenant_id', tenant::text, true);
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
END
$$;
