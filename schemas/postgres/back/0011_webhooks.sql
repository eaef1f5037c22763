-- Undoes 0011.
DROP FUNCTION queue_webhook_deliveries(uuid, jsonb);
DROP TABLE webhook_lanes, webhook_deliveries;

-- A secret without its key opens for nobody, and a row without one could not come back: webhooks go with their keys.
-- TRUNCATE, since an owner that is no superuser is bound by row-level security and would delete nothing.
TRUNCATE webhooks;
ALTER TABLE webhooks
    DROP CONSTRAINT webhooks_check,
    DROP CONSTRAINT webhooks_check1,
    DROP CONSTRAINT webhooks_url_check,
    DROP CONSTRAINT webhooks_status_check,
    ADD CONSTRAINT webhooks_status_check CHECK (status IN ('active', 'paused')),
    DROP COLUMN secret_key_id,
    DROP COLUMN previous_secret_encrypted,
    DROP COLUMN previous_secret_key_id,
    DROP COLUMN previous_secret_until,
    DROP COLUMN disabled_reason;

-- As 0008 has it.
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
    END LOOP;
    PERFORM set_config('app.tenant_id', coalesce(before, ''), true);
END
$$;
