-- How long a tenant's finished work, its usage and its audit log are kept, and who may delete what is older.
--
-- Nobody can delete what is younger than the tenant's own period says: the policies below compare each row with it,
-- whatever the statement. Without a period nothing is ever deleted. Deleting belongs to a role of its own, settler_janitor,
-- which the services' login can switch to (SET LOCAL ROLE) and does not inherit.

CREATE TABLE tenant_retention (
    tenant_id  uuid NOT NULL REFERENCES tenants (id),
    kind       text NOT NULL CHECK (kind IN ('executions', 'usage', 'audit')),
    keep_days  integer NOT NULL CHECK (keep_days BETWEEN 1 AND 36500),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, kind),
    -- An audit log that can be emptied after a day proves nothing.
    CHECK (kind <> 'audit' OR keep_days >= 90)
);
CALL protect_tenant_table('tenant_retention');
GRANT SELECT, INSERT, UPDATE, DELETE ON tenant_retention TO settler_services;
GRANT SELECT ON tenant_retention TO settler_janitor;

-- Rows of `kind` are kept from this moment on; NULL, which nothing is before, where the tenant keeps them for ever.
-- STABLE and called in a sub-select: once per statement. Without a search path of its own: the table is the tenant's.
CREATE FUNCTION kept_since(kept text) RETURNS timestamptz
LANGUAGE sql STABLE
AS $$
    SELECT now() - make_interval(days => keep_days) FROM tenant_retention
    WHERE tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid AND kind = kept
$$;
GRANT EXECUTE ON FUNCTION kept_since(text) TO settler_services, settler_janitor;

CREATE POLICY past_retention ON jobs AS RESTRICTIVE FOR DELETE TO settler_janitor
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND finished_at < (SELECT kept_since('executions')));
CREATE POLICY past_retention ON executions AS RESTRICTIVE FOR DELETE TO settler_janitor
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND EXISTS (SELECT FROM jobs j
                       WHERE j.tenant_id = executions.tenant_id AND j.job_id = executions.job_id
                         AND j.finished_at < (SELECT kept_since('executions'))));
CREATE POLICY past_retention ON tenant_usage AS RESTRICTIVE FOR DELETE TO settler_janitor
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND window_start < (SELECT kept_since('usage')));
CREATE POLICY past_retention ON tenant_signals AS RESTRICTIVE FOR DELETE TO settler_janitor
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND signalled_at < (SELECT kept_since('usage')));
CREATE POLICY past_retention ON audit_logs AS RESTRICTIVE FOR DELETE TO settler_janitor
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND recorded_at < (SELECT kept_since('audit')));

GRANT SELECT, DELETE ON jobs, executions, matches, unmatched, reports, tenant_usage, tenant_signals, audit_logs
    TO settler_janitor;

CREATE INDEX jobs_by_end ON jobs (tenant_id, finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX tenant_usage_by_time ON tenant_usage (tenant_id, window_start);
