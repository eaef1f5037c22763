-- A schema per tenant, for those who want one: the same tables, under the same rules, with the rows of one tenant.
--
-- What belongs to all stays in this schema: the tenants and their slugs, the outbox, the lanes of webhooks, the flags (a
-- tenant reads the platform's as well), stream positions, functions. Everything else is found by name along the search
-- path, which is set together with the context: a tenant's own schema first, if it has one. Row-level security binds in
-- both.

-- Which tenants have a schema. `layout` is the number of the last migration that the schema has seen.
CREATE TABLE tenant_schemas (
    tenant_id   uuid PRIMARY KEY REFERENCES tenants (id),
    schema_name name NOT NULL CHECK (schema_name = 't_' || replace(tenant_id::text, '-', '')),
    layout      integer NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CALL protect_tenant_table('tenant_schemas');
GRANT SELECT ON tenant_schemas TO settler_services, settler_relay, settler_janitor;

-- Begins the work of a transaction for `tenant`: the context, and where its tables are. The lock keeps the tenant from
-- being moved meanwhile; there are 1,024 of them, so that a batch for many tenants holds a bounded number.
CREATE FUNCTION tenant_lock(tenant uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN hashtextextended('settler/tenant-schema', 0) + (hashtextextended(tenant::text, 0) & 1023);

CREATE FUNCTION enter_tenant(tenant uuid) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    own name;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(public.tenant_lock(tenant));
    PERFORM set_config('app.tenant_id', tenant::text, true);
    SELECT schema_name INTO own FROM public.tenant_schemas WHERE tenant_id = tenant;
    PERFORM set_config('search_path', concat(quote_ident(own) || ', ', 'public, pg_temp'), true);
END
$$;
-- Also to the roles that a transaction takes on: the session of a pooler may still have one when the next one enters.
GRANT EXECUTE ON FUNCTION tenant_lock(uuid), enter_tenant(uuid)
    TO settler_services, settler_relay, settler_courier, settler_janitor;

-- As before, but each tenant's effects go where its tables are.
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
        PERFORM enter_tenant(tenant);
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

-- The tables of a schema that hold one tenant's rows and are not read across tenants.
CREATE FUNCTION tenant_tables(of_schema name) RETURNS SETOF oid
LANGUAGE sql STABLE
AS $$
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = of_schema AND c.relkind IN ('r', 'p')
      AND c.relname NOT IN ('outbox', 'feature_flags', 'tenant_schemas', 'tenant_slugs', 'webhook_lanes')
      AND EXISTS (SELECT FROM pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped)
$$;

-- Everything that makes up a tenant's tables in `of_schema`, as the statements that would create it anew in another
-- schema. One text serves both: a schema is made by running those of this schema, and has the same layout as long as
-- the two are equal. Names come out unqualified because the schema is in front of the path.
CREATE FUNCTION tenant_layout(of_schema name) RETURNS SETOF text
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

-- SECURITY DEFINER, reviewed: the services cannot create schemas. The function takes no argument: it makes the schema
-- of the tenant in whose context it runs, once, in the transaction that created the tenant.
CREATE FUNCTION create_tenant_schema() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    tenant uuid := NULLIF(current_setting('app.tenant_id', true), '')::uuid;
    own name := 't_' || replace(tenant::text, '-', '');
    layout text[] := ARRAY(SELECT tenant_layout('public'));
    statement text;
BEGIN
    INSERT INTO tenant_schemas (tenant_id, schema_name, layout)
    SELECT tenant, own, max(version) FROM schema_migrations;
    EXECUTE format('CREATE SCHEMA %I', own);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO settler_services, settler_janitor', own);
    PERFORM set_config('search_path', quote_ident(own) || ', public, pg_temp', true);
    FOREACH statement IN ARRAY layout LOOP
        EXECUTE statement;
    END LOOP;
END
$$;
GRANT EXECUTE ON FUNCTION create_tenant_schema() TO settler_services;

-- Moves the rows of the context's tenant from one schema to the other: all tables or none. It returns how many; a table
-- of which fewer were deleted than copied, or more, undoes everything. For the owner: nobody else is granted it.
CREATE FUNCTION move_tenant_rows(source name, target name) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
    tenant uuid := NULLIF(current_setting('app.tenant_id', true), '')::uuid;
    tables name[];
    columns text;
    copied bigint[];
    deleted bigint;
BEGIN
    -- Those that others refer to come first, and leave last.
    SELECT array_agg(c.relname ORDER BY EXISTS (
               SELECT FROM pg_constraint k
               WHERE k.conrelid = c.oid AND k.contype = 'f' AND k.confrelid IN (SELECT tenant_tables('public'))), c.relname)
    INTO tables FROM pg_class c WHERE c.oid IN (SELECT tenant_tables('public'));
    FOR at IN 1 .. array_length(tables, 1) LOOP
        SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns FROM pg_attribute
        WHERE attrelid = format('public.%I', tables[at])::regclass
          AND attnum > 0 AND NOT attisdropped AND attgenerated = '';
        EXECUTE format('INSERT INTO %I.%I (%s) SELECT %s FROM %I.%I WHERE tenant_id = $1',
                       target, tables[at], columns, columns, source, tables[at]) USING tenant;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        copied[at] := deleted;
    END LOOP;
    FOR at IN REVERSE array_length(tables, 1) .. 1 LOOP
        EXECUTE format('DELETE FROM %I.%I WHERE tenant_id = $1', source, tables[at]) USING tenant;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        IF deleted <> copied[at] THEN
            RAISE EXCEPTION 'tenant %: % rows of % were copied, and % deleted', tenant, copied[at], tables[at], deleted;
        END IF;
    END LOOP;
    RETURN (SELECT sum(n) FROM unnest(copied) AS n);
END
$$;
