-- Undoes 0028: the function as 0016 has it.
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
