-- Undoes 0020: as 0018 has it.
CREATE OR REPLACE PROCEDURE protect_tenant_table(guarded regclass, tenant_column name DEFAULT 'tenant_id')
LANGUAGE plpgsql
AS $$
DECLARE
    context text := 'NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid';
    seen text := format('%I = ' || context, tenant_column);
    written text := format('%I = (SELECT ' || context || ')', tenant_column);
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', guarded);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', guarded);
    EXECUTE format('CREATE POLICY tenant_rows ON %1$s USING (%2$s) WITH CHECK (%3$s)', guarded, seen, written);
    EXECUTE format('CREATE POLICY tenant_rows_only ON %1$s AS RESTRICTIVE USING (%2$s) WITH CHECK (%3$s)',
                   guarded, seen, written);
    EXECUTE format('CREATE POLICY under_erasure ON %1$s AS RESTRICTIVE TO settler_eraser
                    USING (%2$s AND (SELECT being_erased())) WITH CHECK (%2$s AND (SELECT being_erased()))',
                   guarded, written);
    EXECUTE format('GRANT SELECT, DELETE ON %s TO settler_eraser', guarded);
END
$$;
