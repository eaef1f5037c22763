-- scope: tenant
-- Undoes 0021. Run in each tenant's own schema, then in the shared one.
DO $$
DECLARE
    behind_select text := $_$( SELECT (NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid AS "nullif")$_$;
    direct text := $_$(NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid$_$;
    policy record;
BEGIN
    FOR policy IN
        SELECT c.relname, a.attname
        FROM pg_policy p
        JOIN pg_class c ON c.oid = p.polrelid
        JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = current_schema()::regnamespace
          AND p.polname = 'tenant_rows_only' AND p.polcmd = '*'
          AND pg_get_expr(p.polqual, p.polrelid) = format('(%I = %s)', a.attname, direct)
    LOOP
        EXECUTE format('ALTER POLICY tenant_rows ON %1$I USING (%2$I = %3$s) WITH CHECK (%2$I = %4$s)',
                       policy.relname, policy.attname, direct, behind_select);
        EXECUTE format('ALTER POLICY tenant_rows_only ON %I WITH CHECK (%I = %s)',
                       policy.relname, policy.attname, behind_select);
    END LOOP;
END
$$;
