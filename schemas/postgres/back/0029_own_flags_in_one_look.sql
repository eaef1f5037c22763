-- Undoes 0029: the policy as 0026 has it.
ALTER POLICY tenant_rows_only ON feature_flags
    USING (tenant_id IN (NULLIF(current_setting('app.tenant_id', true), '')::uuid,
                         '00000000-0000-0000-0000-000000000000')
           AND NULLIF(current_setting('app.tenant_id', true), '')::uuid IS NOT NULL);
