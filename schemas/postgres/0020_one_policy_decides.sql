-- The policies of new tables; 0021 brings those that there are into the same form.
--
-- A restrictive policy decides, alone: it is AND-ed to whatever permissive ones there are, so that a careless later one
-- widens nothing. PostgreSQL shows no row at all without a permissive one; that one says nothing. It used to compare
-- the same two values once more, and an upsert checks every policy up to six times for a row: a third of what row-level
-- security cost it. What the second comparison was good for, the first one being dropped, is looked for instead where a
-- service opens its connections, and with it what no second comparison helps against: row-level security switched off.
--
-- What is written is compared with the setting itself, like what is seen (0018): a sub-select costs a statement more
-- than it saves unless the statement has some dozens of rows.
CREATE OR REPLACE PROCEDURE protect_tenant_table(guarded regclass, tenant_column name DEFAULT 'tenant_id')
LANGUAGE plpgsql
AS $$
DECLARE
    context text := 'NULLIF(current_setting(''app.tenant_id'', true), '''')::uuid';
    own text := format('%I = ' || context, tenant_column);
    own_once text := format('%I = (SELECT ' || context || ')', tenant_column);
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', guarded);
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', guarded);
    EXECUTE format('CREATE POLICY tenant_rows ON %s USING (true) WITH CHECK (true)', guarded);
    EXECUTE format('CREATE POLICY tenant_rows_only ON %1$s AS RESTRICTIVE USING (%2$s) WITH CHECK (%2$s)', guarded, own);
    EXECUTE format('CREATE POLICY under_erasure ON %1$s AS RESTRICTIVE TO settler_eraser
                    USING (%2$s AND (SELECT being_erased())) WITH CHECK (%2$s AND (SELECT being_erased()))',
                   guarded, own_once);
    EXECUTE format('GRANT SELECT, DELETE ON %s TO settler_eraser', guarded);
END
$$;
