-- scope: tenant
-- Undoes 0030: usage is as old as its window's start.
ALTER POLICY past_retention ON tenant_usage
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND window_start < (SELECT kept_since('usage')));
