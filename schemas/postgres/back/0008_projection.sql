-- Undoes 0008. `instant` goes last, as it came first.
DROP FUNCTION
    project_batch(jsonb), project_dead_letters(uuid, jsonb), project_audit_entries(uuid, jsonb),
    project_flags(uuid, jsonb), project_signals(uuid, jsonb), project_quota_usage(uuid, jsonb),
    project_usage(uuid, jsonb), project_executions(uuid, jsonb), project_job_results(uuid, jsonb),
    project_job_decisions(uuid, jsonb);
DROP FUNCTION instant(bigint);
