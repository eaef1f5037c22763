-- scope: tenant
-- Undoes 0019. Run in each tenant's own schema, then in the shared one.
DO $$
DECLARE
    behind_select text := $_$( SELECT (NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid AS "nullif")$_$;
    direct text := $_$(NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid$_$;
    policy record;
BEGIN
    FOR policy IN
        SELECT p.polname, c.relname, a.attname
        FROM pg_policy p
        JOIN pg_class c ON c.oid = p.polrelid
        JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = current_schema()::regnamespace
          AND pg_get_expr(p.polqual, p.polrelid) = format('(%I = %s)', a.attname, direct)
    LOOP
        EXECUTE format('ALTER POLICY %I ON %I USING (%I = %s)', policy.polname, policy.relname, policy.attname, behind_select);
    END LOOP;
END
$$;
