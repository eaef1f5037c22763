-- scope: tenant
-- Undoes 0025: each table of a tenant's schema refers to `tenants` as the shared one does.

DO $migration$
DECLARE
    foreign_key record;
BEGIN
    IF current_schema() = 'public' THEN
CREATE OR REPLACE FUNCTION tenant_layout(of_schema name) RETURNS SETOF text
LANGUAGE plpgsql
AS $$
DECLARE
    path text := current_setting('search_path');
BEGIN
    PERFORM set_config('search_path', quote_ident(of_schema) || ', public, pg_temp', true);
    RETURN QUERY
    WITH tables AS (
        SELECT c.oid, c.relname, c.relowner, c.relacl, c.relrowsecurity, c.relforcerowsecurity
        FROM pg_class c WHERE c.oid IN (SELECT tenant_tables(of_schema))
    ), views AS (
        SELECT c.oid, c.relname, c.relowner, c.relacl, c.reloptions FROM pg_class c
        WHERE c.relnamespace = (SELECT n.oid FROM pg_namespace n WHERE n.nspname = of_schema) AND c.relkind = 'v'
    ), granted AS (
        SELECT r.relname, a.privilege_type, NULL::name AS attname, a.grantee
        FROM (SELECT relname, relowner, relacl FROM tables UNION ALL SELECT relname, relowner, relacl FROM views) AS r
        CROSS JOIN aclexplode(r.relacl) AS a WHERE a.grantee <> r.relowner
        UNION ALL
        SELECT t.relname, a.privilege_type, c.attname, a.grantee
        FROM tables t JOIN pg_attribute c ON c.attrelid = t.oid AND NOT c.attisdropped
        CROSS JOIN aclexplode(c.attacl) AS a WHERE a.grantee <> t.relowner
    ), statements (step, name, detail, statement) AS (
        SELECT 1, t.relname::text, '', format('CREATE TABLE %I (%s)', t.relname, (
            SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod))
                || CASE WHEN a.attgenerated = 's' THEN ' GENERATED ALWAYS AS (' || pg_get_expr(d.adbin, d.adrelid) || ') STORED'
                        WHEN a.attidentity = 'a' THEN ' GENERATED ALWAYS AS IDENTITY'
                        WHEN d.adbin IS NOT NULL THEN ' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid) ELSE '' END
                || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END, ', ' ORDER BY a.attnum)
            FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
            WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped))
        FROM tables t
        UNION ALL
        SELECT CASE k.contype WHEN 'f' THEN 3 ELSE 2 END, t.relname, k.conname,
               format('ALTER TABLE %I ADD CONSTRAINT %I %s', t.relname, k.conname, pg_get_constraintdef(k.oid, true))
        FROM tables t JOIN pg_constraint k ON k.conrelid = t.oid AND k.contype IN ('c', 'p', 'u', 'f', 'x')
        UNION ALL
        SELECT 4, t.relname, i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid, 0, true)
        FROM tables t JOIN pg_index i ON i.indrelid = t.oid
        WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = t.oid)
        UNION ALL
        SELECT 5, t.relname, '', format('ALTER TABLE %I %s ROW LEVEL SECURITY, %s ROW LEVEL SECURITY', t.relname,
                                        CASE WHEN t.relrowsecurity THEN 'ENABLE' ELSE 'DISABLE' END,
                                        CASE WHEN t.relforcerowsecurity THEN 'FORCE' ELSE 'NO FORCE' END)
        FROM tables t
        UNION ALL
        SELECT 6, t.relname, p.polname, format('CREATE POLICY %I ON %I AS %s FOR %s TO %s', p.polname, t.relname,
                CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
                CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
                              WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
                (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE r::regrole::text END, ', ' ORDER BY r)
                 FROM unnest(p.polroles) AS r))
            || coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', '')
            || coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', '')
        FROM tables t JOIN pg_policy p ON p.polrelid = t.oid
        UNION ALL
        SELECT 7, t.relname, g.tgname, pg_get_triggerdef(g.oid, true)
        FROM tables t JOIN pg_trigger g ON g.tgrelid = t.oid AND NOT g.tgisinternal
        UNION ALL
        SELECT 8, v.relname, '', format('CREATE VIEW %I WITH (%s) AS %s', v.relname, array_to_string(v.reloptions, ', '),
                                        pg_get_viewdef(v.oid))
        FROM views v
        UNION ALL
        SELECT 9, g.relname, concat_ws(' ', g.privilege_type, g.attname, g.grantee),
               format('GRANT %s%s ON %I TO %s', g.privilege_type, coalesce(' (' || quote_ident(g.attname) || ')', ''), g.relname,
                      CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END)
        FROM granted g
    )
    SELECT s.statement FROM statements s ORDER BY s.step, s.name, s.detail;
    PERFORM set_config('search_path', path, true);
END
$$;
    ELSE
        FOR foreign_key IN
            SELECT c.relname AS of_table, k.conname AS name, pg_get_constraintdef(k.oid) AS definition
            FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
            WHERE k.conrelid IN (SELECT tenant_tables('public')) AND k.contype = 'f'
              AND k.confrelid NOT IN (SELECT tenant_tables('public'))
        LOOP
            EXECUTE format('ALTER TABLE %I ADD CONSTRAINT %I %s',
                           foreign_key.of_table, foreign_key.name, foreign_key.definition);
        END LOOP;
    END IF;
END
$migration$;
