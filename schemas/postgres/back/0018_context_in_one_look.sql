-- Undoes 0018: as 0016 has it.
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
