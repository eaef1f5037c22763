-- scope: tenant
-- Undoes 0024: rejected jobs are kept for ever.
DROP INDEX jobs_by_end;
CREATE INDEX jobs_by_end ON jobs (tenant_id, finished_at) WHERE finished_at IS NOT NULL;
ALTER POLICY past_retention ON jobs
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND finished_at < (SELECT kept_since('executions')));
ALTER POLICY past_retention ON executions
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND EXISTS (SELECT FROM jobs j
                       WHERE j.tenant_id = executions.tenant_id AND j.job_id = executions.job_id
                         AND j.finished_at < (SELECT kept_since('executions'))));
