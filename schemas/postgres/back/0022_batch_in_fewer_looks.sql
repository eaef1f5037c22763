-- Undoes 0022: the function as 0016 has it, the policies as 0021 left them.
ALTER POLICY tenant_rows_only ON tenant_schemas USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);
ALTER POLICY tenant_rows_only ON erasures USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid);

        CREATE OR REPLACE FUNCTION project_batch(batch jsonb) RETURNS void
        LANGUAGE plpgsql
        AS $$
        DECLARE
            before text := current_setting('app.tenant_id', true);
            path text := current_setting('search_path');
            tenant uuid;
            effects jsonb;
        BEGIN
            FOR tenant, effects IN SELECT key::uuid, value FROM jsonb_each(batch) ORDER BY 1 LOOP
                CONTINUE WHEN NOT open_tenant(tenant);
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
            PERFORM set_config('search_path', path, true);
        END
        $$;
