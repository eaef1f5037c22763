-- A tenant's schema is made of the layout that there is, and labelled with the last migration. A migration that committed
-- between the two would have left it with the layout before and the label behind, and so without what the recorder
-- writes; one that committed before the schema did would not have found it among those that have to follow. So neither
-- happens while the other does. Nobody waits: whoever comes while the database is migrated tries again.
CREATE OR REPLACE FUNCTION create_tenant_schema() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    tenant uuid := NULLIF(current_setting('app.tenant_id', true), '')::uuid;
    own name := 't_' || replace(tenant::text, '-', '');
    layout text[];
    statement text;
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(hashtextextended('settler/migrate', 0)) THEN
        RAISE EXCEPTION 'the database is being migrated' USING ERRCODE = 'lock_not_available';
    END IF;
    layout := ARRAY(SELECT tenant_layout('public'));
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
