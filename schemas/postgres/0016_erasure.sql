-- scope: tenant
-- Erasure: a deleted tenant whose grace period is over, and every row of it, and who may do that.
--
-- A row of `erasures` says that a tenant is being erased, or was. From its commit on no transaction of a service begins
-- in the tenant's context, and what projections still learn of it is passed over. Deleting belongs to a role of its own,
-- settler_eraser, which the services' login can switch to (SET LOCAL ROLE) and does not inherit; policies let it see and
-- delete rows of a tenant that is being erased, and of no other.
--
-- Run in the shared schema, then in each tenant's own. What all tenants share changes in the first of these runs.

DO $migration$
DECLARE
    guarded name;
BEGIN
    IF current_schema() = 'public' THEN
        -- The proof that stays: no name of anybody but of who asked. `steps` are those that are done, `counts` how many
        -- rows, files, keys and records there were of the tenant, by place.
        CREATE TABLE erasures (
            tenant_id uuid PRIMARY KEY,
            root_id   uuid NOT NULL,
            version   bigint NOT NULL CHECK (version >= 1),
            asked_by  text NOT NULL CHECK (length(asked_by) BETWEEN 1 AND 200),
            begun_at  timestamptz NOT NULL DEFAULT now(),
            ended_at  timestamptz,
            steps     text[] NOT NULL DEFAULT '{}',
            counts    jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(counts) = 'object')
        );
        CALL protect_tenant_table('erasures');
        GRANT SELECT ON erasures TO settler_services, settler_relay, settler_janitor;
        GRANT SELECT, INSERT ON erasures TO settler_eraser;
        GRANT UPDATE (steps, counts, ended_at) ON erasures TO settler_eraser;
        GRANT SELECT ON tenants, tenant_schemas TO settler_eraser;
        GRANT INSERT ON outbox TO settler_eraser;

        -- Whether the context's tenant may be erased. Without a search path of its own: the children are the tenant's.
        CREATE FUNCTION due_for_erasure() RETURNS boolean
        LANGUAGE sql STABLE
        AS $$
            SELECT EXISTS (
                SELECT FROM tenants
                WHERE id = NULLIF(current_setting('app.tenant_id', true), '')::uuid
                  AND status = 'deleted' AND erase_after <= now()
            ) AND NOT EXISTS (
                SELECT FROM tenant_children
                WHERE tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid)
        $$;
        CREATE POLICY only_what_is_due ON erasures AS RESTRICTIVE FOR INSERT
            WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid)
                        AND ended_at IS NULL AND (SELECT due_for_erasure()));
        CREATE POLICY only_until_it_has_ended ON erasures AS RESTRICTIVE FOR UPDATE
            USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) AND ended_at IS NULL)
            WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));

        -- STABLE and called in a sub-select: once per statement.
        CREATE FUNCTION being_erased() RETURNS boolean
        LANGUAGE sql STABLE
        AS $$
            SELECT EXISTS (
                SELECT FROM public.erasures
                WHERE tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid AND ended_at IS NULL)
        $$;
        GRANT EXECUTE ON FUNCTION due_for_erasure(), being_erased() TO settler_eraser;

        -- As enter_tenant was; false, and no path, when the tenant is being erased or was. With the lock that an
        -- erasure begins under, nobody who got true meets one that began meanwhile.
        CREATE FUNCTION open_tenant(tenant uuid) RETURNS boolean
        LANGUAGE plpgsql
        AS $$
        DECLARE
            own name;
        BEGIN
            PERFORM pg_advisory_xact_lock_shared(public.tenant_lock(tenant));
            PERFORM set_config('app.tenant_id', tenant::text, true);
            IF EXISTS (SELECT FROM public.erasures WHERE tenant_id = tenant) THEN
                RETURN false;
            END IF;
            SELECT schema_name INTO own FROM public.tenant_schemas WHERE tenant_id = tenant;
            PERFORM set_config('search_path', concat(quote_ident(own) || ', ', 'public, pg_temp'), true);
            RETURN true;
        END
        $$;
        CREATE OR REPLACE FUNCTION enter_tenant(tenant uuid) RETURNS void
        LANGUAGE plpgsql
        AS $$
        BEGIN
            IF NOT public.open_tenant(tenant) THEN
                RAISE EXCEPTION 'tenant % was erased', tenant USING ERRCODE = 'SE001';
            END IF;
        END
        $$;
        GRANT EXECUTE ON FUNCTION open_tenant(uuid)
            TO settler_services, settler_relay, settler_courier, settler_janitor, settler_eraser;
        GRANT EXECUTE ON FUNCTION enter_tenant(uuid) TO settler_eraser;

        -- The eraser's way in.
        CREATE FUNCTION enter_erasure(tenant uuid) RETURNS void
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
        GRANT EXECUTE ON FUNCTION tenant_lock(uuid), enter_erasure(uuid) TO settler_eraser;

        -- As before, but what comes late of an erased tenant is passed over.
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

        -- As before, without the erasures: they outlive every schema.
        CREATE OR REPLACE FUNCTION tenant_tables(of_schema name) RETURNS SETOF oid
        LANGUAGE sql STABLE
        AS $$
            SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = of_schema AND c.relkind IN ('r', 'p')
              AND c.relname NOT IN (
                  'outbox', 'feature_flags', 'tenant_schemas', 'tenant_slugs', 'webhook_lanes', 'erasures')
              AND EXISTS (SELECT FROM pg_attribute a
                          WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped)
        $$;

        -- As before, with the eraser's way into the schema.
        CREATE OR REPLACE FUNCTION create_tenant_schema() RETURNS void
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
            EXECUTE format('GRANT USAGE ON SCHEMA %I TO settler_services, settler_janitor, settler_eraser', own);
            PERFORM set_config('search_path', quote_ident(own) || ', public, pg_temp', true);
            FOREACH statement IN ARRAY layout LOOP
                EXECUTE statement;
            END LOOP;
        END
        $$;

        -- As before; and the eraser reaches the table, which a later one would otherwise be found to withhold from it.
        CREATE OR REPLACE PROCEDURE protect_tenant_table(guarded regclass, tenant_column name DEFAULT 'tenant_id')
        LANGUAGE plpgsql
        AS $$
        DECLARE
            own_row text := format(
                '%I = (SELECT NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid)', tenant_column);
        BEGIN
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', guarded);
            EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', guarded);
            EXECUTE format('CREATE POLICY tenant_rows ON %1$s USING (%2$s) WITH CHECK (%2$s)', guarded, own_row);
            EXECUTE format('CREATE POLICY tenant_rows_only ON %1$s AS RESTRICTIVE USING (%2$s) WITH CHECK (%2$s)',
                           guarded, own_row);
            EXECUTE format('CREATE POLICY under_erasure ON %1$s AS RESTRICTIVE TO settler_eraser
                            USING (%2$s AND (SELECT being_erased())) WITH CHECK (%2$s AND (SELECT being_erased()))',
                           guarded, own_row);
            EXECUTE format('GRANT SELECT, DELETE ON %s TO settler_eraser', guarded);
        END
        $$;

        -- SECURITY DEFINER, reviewed: nobody but the owner drops schemas and frees slugs. The function takes no argument:
        -- it ends the tenant in whose context it runs, which has to be one that is being erased. Its schema, whose name
        -- is made of its id, its parent's row about it, its slug and its own row go together; a foreign key holds it up
        -- while other rows are left.
        CREATE FUNCTION forget_tenant() RETURNS void
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path FROM CURRENT
        AS $$
        DECLARE
            tenant uuid := NULLIF(current_setting('app.tenant_id', true), '')::uuid;
            parent uuid;
            own name;
        BEGIN
            IF NOT being_erased() THEN
                RAISE EXCEPTION 'tenant % is not being erased', tenant USING ERRCODE = 'insufficient_privilege';
            END IF;
            SELECT schema_name INTO own FROM tenant_schemas WHERE tenant_id = tenant;
            IF own IS NOT NULL THEN
                DELETE FROM tenant_schemas WHERE tenant_id = tenant;
                EXECUTE format('DROP SCHEMA %I CASCADE', own);
            END IF;
            SELECT parent_id INTO parent FROM tenants WHERE id = tenant;
            IF parent IS NOT NULL THEN
                PERFORM pg_advisory_xact_lock_shared(tenant_lock(parent));
                PERFORM set_config('app.tenant_id', parent::text, true);
                SELECT schema_name INTO own FROM tenant_schemas WHERE tenant_id = parent;
                EXECUTE format('DELETE FROM %I.tenant_children WHERE tenant_id = $1 AND child_id = $2',
                               coalesce(own, 'public')) USING parent, tenant;
                PERFORM set_config('app.tenant_id', tenant::text, true);
            END IF;
            DELETE FROM tenant_slugs WHERE tenant_id = tenant;
            DELETE FROM tenants WHERE id = tenant;
        END
        $$;
        GRANT EXECUTE ON FUNCTION forget_tenant() TO settler_eraser;
    ELSE
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO settler_eraser', current_schema());
    END IF;

    FOR guarded IN
        SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p')
          AND a.attname = 'tenant_id' AND NOT a.attisdropped
          AND c.relname NOT IN ('tenant_schemas', 'tenant_slugs', 'erasures')
        ORDER BY 1
    LOOP
        -- Whether there are children has to be seen before an erasure begins. A tenant's own schema may have got the
        -- policy already, with a table that an earlier migration made there after this one had run in the shared one.
        EXECUTE format('DROP POLICY IF EXISTS under_erasure ON %I', guarded);
        EXECUTE format('CREATE POLICY under_erasure ON %I AS RESTRICTIVE FOR %s TO settler_eraser
                        USING (tenant_id = (SELECT NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid)
                               AND (SELECT being_erased()))%s', guarded,
                       CASE guarded WHEN 'tenant_children' THEN 'DELETE' ELSE 'ALL' END,
                       CASE guarded WHEN 'tenant_children' THEN '' ELSE '
                        WITH CHECK (tenant_id = (SELECT NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid)
                                    AND (SELECT being_erased()))' END);
        EXECUTE format('GRANT SELECT, DELETE ON %I TO settler_eraser', guarded);
    END LOOP;
END
$migration$;
