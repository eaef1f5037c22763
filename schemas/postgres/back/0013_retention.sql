-- Undoes 0013: everything is kept for ever.
DROP INDEX jobs_by_end, tenant_usage_by_time;
REVOKE SELECT, DELETE ON jobs, executions, matches, unmatched, reports, tenant_usage, tenant_signals, audit_logs
    FROM settler_janitor;
DROP POLICY past_retention ON jobs;
DROP POLICY past_retention ON executions;
DROP POLICY past_retention ON tenant_usage;
DROP POLICY past_retention ON tenant_signals;
DROP POLICY past_retention ON audit_logs;
DROP FUNCTION kept_since(text);
DROP TABLE tenant_retention;
