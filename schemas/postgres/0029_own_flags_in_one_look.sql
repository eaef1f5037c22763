-- A tenant's own flag is found by the one comparison that every other table has; only a row that is not its own is
-- asked for whether it is the platform's. An upsert reads what it writes, so each row of a batch is checked by this
-- policy up to three times, and 0026 looked at the context twice in each of them.
ALTER POLICY tenant_rows_only ON feature_flags
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid
           OR (tenant_id = '00000000-0000-0000-0000-000000000000'
               AND NULLIF(current_setting('app.tenant_id', true), '')::uuid IS NOT NULL));
