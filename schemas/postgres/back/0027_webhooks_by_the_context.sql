-- Undoes 0027: the function as 0026 has it.
CREATE OR REPLACE FUNCTION open_webhooks(tenant uuid)
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
