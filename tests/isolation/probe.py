"""What a tenant's session tries against another tenant's rows, in one block: fast enough for every mutant."""

from __future__ import annotations

import asyncpg

A = "aaaaaaaa-0000-4000-8000-00000000000a"
B = "bbbbbbbb-0000-4000-8000-00000000000b"

# Runs as the services' login, A's context. Only B has rows, apart from A's row of `tenants`. Whatever succeeds and must
# not is gathered in the setting probe.found; the block's own savepoints undo it.
_PROBE = """
DO $probe$
DECLARE
    relation record;
    attempt text;
    affected bigint;
    found text := '';
BEGIN
    PERFORM set_config('app.tenant_id', 'AAA', true);
    FOR relation IN
        SELECT c.oid::regclass AS name, CASE c.relname WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END AS tenant_column,
               c.relkind,
               (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
                WHERE attrelid = c.oid AND attnum > 0 AND attgenerated = '' AND attidentity = ''
                  AND attname <> 'tenant_id') AS columns
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v')
          AND a.attname = CASE c.relname WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END
    LOOP
        FOREACH attempt IN ARRAY ARRAY[
            'SELECT FROM %1$s WHERE %2$I <> %3$L AND %2$I <> ''00000000-0000-0000-0000-000000000000''',
            'DELETE FROM %1$s WHERE %2$I <> %3$L',
            'UPDATE %1$s SET %2$I = %3$L WHERE %2$I <> %3$L',
            'UPDATE %1$s SET %2$I = %4$L',
            'TRUNCATE %1$s CASCADE'
        ] LOOP
            BEGIN
                EXECUTE format(attempt, relation.name, relation.tenant_column, 'AAA', 'BBB');
                GET DIAGNOSTICS affected = ROW_COUNT;
                IF affected > 0 AND attempt NOT LIKE 'UPDATE %1$s SET %2$I = %4$L' OR attempt ~ '^(TRUNCATE)' THEN
                    found := concat_ws('; ', NULLIF(found, ''), format(attempt, relation.name, relation.tenant_column,
                                                                      'A', 'B'));
                END IF;
                RAISE SQLSTATE 'PROBE';
            EXCEPTION WHEN SQLSTATE 'PROBE' OR insufficient_privilege OR foreign_key_violation
                        OR wrong_object_type OR object_not_in_prerequisite_state OR feature_not_supported THEN NULL;
            END;
        END LOOP;
    END LOOP;
    PERFORM set_config('probe.found', found, false);
END
$probe$
""".replace("AAA", A).replace("BBB", B)

_PROBE_INSERT = """
DO $probe$
DECLARE
    statement text;
    found text := current_setting('probe.found', true);
BEGIN
    PERFORM set_config('app.tenant_id', 'AAA', true);
    FOREACH statement IN ARRAY string_to_array($rows$ROWS$rows$, '|') LOOP
        BEGIN
            EXECUTE replace(statement, '$1', '''BBB''');
            found := concat_ws('; ', NULLIF(found, ''), 'B''s row by A: ' || left(statement, 30));
            RAISE SQLSTATE 'PROBE';
        EXCEPTION WHEN SQLSTATE 'PROBE' OR insufficient_privilege THEN NULL;
                  WHEN integrity_constraint_violation THEN
            found := concat_ws('; ', NULLIF(found, ''), 'B''s row by A meets constraints: ' || left(statement, 30));
        END;
        BEGIN
            EXECUTE replace(statement, '$1', '''AAA''');
            RAISE SQLSTATE 'PROBE';
        EXCEPTION WHEN SQLSTATE 'PROBE' OR insufficient_privilege THEN NULL;
                  WHEN unique_violation THEN
            found := concat_ws('; ', NULLIF(found, ''), 'a value of B is taken for A: ' || left(statement, 30));
        END;
    END LOOP;
    BEGIN
        EXECUTE 'INSERT INTO api_keys (tenant_id, id, key_hash, name, created_by) '
                'VALUES (''AAA'', gen_random_uuid(), sha256(''x''), ''x'', ''IDI'')';
        found := concat_ws('; ', NULLIF(found, ''), 'A''s key by B''s user');
        RAISE SQLSTATE 'PROBE';
    EXCEPTION WHEN SQLSTATE 'PROBE' OR foreign_key_violation THEN NULL;
    END;
    PERFORM set_config('probe.found', found, false);
END
$probe$
"""

ROW_ID = "cccccccc-0000-4000-8000-00000000000c"


def inserts(rows: dict[str, str]) -> str:
    """``rows`` (statements with $1 the tenant and $2 an id) as the block above takes them."""
    return "|".join(statement.replace("$2", f"'{ROW_ID}'") for statement in rows.values())


async def findings(owner: asyncpg.Connection, rows: dict[str, str]) -> str:
    """What A could do that it must not; empty when nothing. Inside the owner's transaction, which rolls back.

    In the schema that stands first in the search path: the shared one, or B's own.
    """
    block = _PROBE_INSERT.replace("AAA", A).replace("BBB", B).replace("IDI", ROW_ID).replace("ROWS", inserts(rows))
    await owner.execute("SET LOCAL SESSION AUTHORIZATION settler_app; SELECT set_config('probe.found', '', false)")
    try:
        await owner.execute(_PROBE)
        await owner.execute(block)
    except asyncpg.PostgresError as error:
        return f"A's own work fails: {error}"
    return await owner.fetchval("SELECT current_setting('probe.found')")
