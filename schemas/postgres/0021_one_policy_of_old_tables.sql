-- scope: tenant
--
-- Of every table that has the two policies of 0019, one decides, as 0020 says. The rows of matching come in statements of
-- up to 10,000: there the sub-select stays, which reads the context once for all of them.
DO $$
DECLARE
    direct text := $_$(NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid$_$;
    twins record;
BEGIN
    FOR twins IN
        SELECT c.relname, a.attname
        FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = current_schema()::regnamespace
          AND 2 = (SELECT count(*) FROM pg_policy p
                   WHERE p.polrelid = c.oid AND p.polname IN ('tenant_rows', 'tenant_rows_only') AND p.polcmd = '*'
                     AND pg_get_expr(p.polqual, c.oid) = format('(%I = %s)', a.attname, direct))
    LOOP
        EXECUTE format('ALTER POLICY tenant_rows ON %I USING (true) WITH CHECK (true)', twins.relname);
        IF twins.relname NOT IN ('matches', 'unmatched') THEN
            EXECUTE format('ALTER POLICY tenant_rows_only ON %I WITH CHECK (%I = %s)', twins.relname, twins.attname, direct);
        END IF;
    END LOOP;
END
$$;
