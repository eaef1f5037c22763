-- scope: tenant
--
-- A job that was rejected ended when that was decided: it is kept for the tenant's period from then on, as a finished one
-- is from its result. Before, only a result's time counted, and a rejected job was kept for ever.
--
-- `status` is 'rejected' only without an outcome. So an admitted job without one is never past its period, however old;
-- and a job that has both, since its request came again long after it was done, ended with its result.
ALTER POLICY past_retention ON jobs
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND CASE status WHEN 'rejected' THEN decided_at ELSE finished_at END < (SELECT kept_since('executions')));
ALTER POLICY past_retention ON executions
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
           AND EXISTS (SELECT FROM jobs j
                       WHERE j.tenant_id = executions.tenant_id AND j.job_id = executions.job_id
                         AND CASE j.status WHEN 'rejected' THEN j.decided_at ELSE j.finished_at END
                             < (SELECT kept_since('executions'))));

-- The sweep finds them by it. Open jobs are not in it: for the recorder an admitted job costs what it did.
DROP INDEX jobs_by_end;
CREATE INDEX jobs_by_end ON jobs (tenant_id, (CASE status WHEN 'rejected' THEN decided_at ELSE finished_at END))
    WHERE CASE status WHEN 'rejected' THEN decided_at ELSE finished_at END IS NOT NULL;
