-- scope: tenant
--
-- Usage is as old as what was used last in its window. By the window's start, a month's usage was past a period of some
-- days while that month was still being counted.
ALTER POLICY past_retention ON tenant_usage
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND window_start + make_interval(secs => window_seconds) < (SELECT kept_since('usage')));
