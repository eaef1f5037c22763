"""Every way to weaken isolation by one step, generated from the live catalogue: a later table has its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import asyncpg


class Mutant(NamedTuple):
    """``kind`` is what it weakens, ``sql`` how, in a transaction of the owner."""

    kind: str
    sql: str


# Each yields (kind, statements).
_GENERATORS = (
    # Row-level security.
    """
    SELECT v.kind, format('ALTER TABLE %I %s', c.relname, v.sql)
    FROM pg_class c CROSS JOIN (VALUES ('enable', 'DISABLE ROW LEVEL SECURITY'),
                                       ('force', 'NO FORCE ROW LEVEL SECURITY')) AS v (kind, sql)
    WHERE relnamespace = 'public'::regnamespace AND c.relrowsecurity AND (v.kind = 'enable' OR c.relforcerowsecurity)
    """,
    # Policies: dropped, widened to everything, widened to everyone who has some context.
    """
    SELECT CASE WHEN polpermissive THEN 'policy' ELSE 'restrictive policy' END || ' ' || v.kind,
           format('%s POLICY %I ON %s %s', CASE v.kind WHEN 'dropped' THEN 'DROP' ELSE 'ALTER' END,
                  polname, polrelid::regclass, v.sql)
    FROM pg_policy CROSS JOIN (VALUES
        ('dropped', ''), ('reads all', 'USING (true)'), ('writes all', 'WITH CHECK (true)'),
        ('reads all in a context', $$USING (current_setting('app.tenant_id', true) <> '')$$),
        ('writes all in a context', $$WITH CHECK (current_setting('app.tenant_id', true) <> '')$$)) AS v (kind, sql)
    WHERE v.kind = 'dropped' OR v.kind LIKE 'reads%' AND pg_get_expr(polqual, polrelid) <> 'true'
       OR v.kind LIKE 'writes%' AND pg_get_expr(polwithcheck, polrelid) <> 'true'
    """,
    # All of a table's at once.
    """
    SELECT 'all policies', string_agg(format('ALTER POLICY %I ON %s %s %s', polname, polrelid::regclass,
        CASE WHEN polqual IS NOT NULL THEN 'USING (true)' END,
        CASE WHEN polwithcheck IS NOT NULL THEN 'WITH CHECK (true)' END), '; ')
    FROM pg_policy WHERE polrelid <> 'stream_positions'::regclass GROUP BY polrelid
    """,
    # Grants that are withheld.
    """
    SELECT 'grant', format('GRANT %s ON %I TO settler_services', privilege, relname)
    FROM pg_class CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER',
                                          'MAINTAIN']) AS privilege
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v')
      AND NOT has_table_privilege('settler_services', oid, privilege)
    """,
    """
    SELECT 'grant to everybody', format('GRANT SELECT ON %I TO PUBLIC', relname)
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'S')
    """,
    """
    SELECT 'grant of a column', format('GRANT %s (%I) ON %s TO settler_services', privilege, attname,
                                       attrelid::regclass)
    FROM pg_attribute JOIN pg_class c ON c.oid = attrelid CROSS JOIN unnest(ARRAY['SELECT', 'UPDATE']) AS privilege
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND attnum > 0 AND NOT attisdropped
      AND NOT has_column_privilege('settler_services', attrelid, attnum, privilege)
    """,
    """
    SELECT v.kind, format(v.sql, oid::regprocedure) FROM pg_proc CROSS JOIN (VALUES
        ('function for everybody', 'GRANT EXECUTE ON ROUTINE %s TO PUBLIC'),
        ('definer function', 'ALTER ROUTINE %s SECURITY DEFINER'),
        ('definer search path', 'ALTER ROUTINE %s RESET search_path')) AS v (kind, sql)
    WHERE pronamespace = 'public'::regnamespace
      AND CASE v.kind WHEN 'definer function' THEN NOT prosecdef WHEN 'definer search path' THEN prosecdef ELSE true END
    """,
    # Keys. Without the tenant: a unique key says whether another's value exists, a foreign key accepts another's row.
    """
    SELECT 'unique key', format('ALTER TABLE %1$s DROP CONSTRAINT %2$I CASCADE; ALTER TABLE %1$s ADD UNIQUE (%3$s)',
        conrelid::regclass, conname,
        (SELECT string_agg(quote_ident(attname), ', ' ORDER BY array_position(conkey, attnum)) FROM pg_attribute
         WHERE attrelid = conrelid AND attnum = ANY (conkey) AND attname <> 'tenant_id'))
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'u')
      AND cardinality(conkey) > 1 AND conrelid <> 'stream_positions'::regclass
      AND EXISTS (SELECT FROM pg_attribute
                  WHERE attrelid = conrelid AND attnum = ANY (conkey) AND attname = 'tenant_id')
    """,
    """
    SELECT 'foreign key', format(
        'ALTER TABLE %1$s DROP CONSTRAINT %2$I; ALTER TABLE %3$s ADD CONSTRAINT alone UNIQUE (%5$I); '
        'ALTER TABLE %1$s ADD FOREIGN KEY (%4$I) REFERENCES %3$s (%5$I)',
        conrelid::regclass, conname, confrelid::regclass, s.attname, t.attname)
    FROM pg_constraint k JOIN LATERAL unnest(conkey, confkey) AS p (source, target) ON true
    JOIN pg_attribute s ON s.attrelid = conrelid AND s.attnum = p.source AND s.attname NOT IN ('tenant_id', 'root_id')
    JOIN pg_attribute t ON t.attrelid = confrelid AND t.attnum = p.target
    WHERE connamespace = 'public'::regnamespace AND contype = 'f' AND cardinality(conkey) > 1
    """,
    """
    SELECT 'constraint dropped', format('ALTER TABLE %s DROP CONSTRAINT %I CASCADE', conrelid::regclass, conname)
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype IN ('f', 'p', 'u') AND conrelid <> 0
    """,
    """
    SELECT 'tenant may be NULL', format('ALTER TABLE %1$s DROP CONSTRAINT %2$I CASCADE; '
                                        'ALTER TABLE %1$s ALTER tenant_id DROP NOT NULL', conrelid::regclass, conname)
    FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attname = 'tenant_id' AND attnum = ANY (conkey)
    WHERE connamespace = 'public'::regnamespace AND contype = 'p'
    """,
    """
    SELECT 'security_invoker', format('ALTER VIEW %I SET (security_invoker = false)', relname)
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'v'
    """,
    """
    SELECT 'trigger', format('ALTER TABLE %s DISABLE TRIGGER %I', tgrelid::regclass, tgname)
    FROM pg_trigger WHERE NOT tgisinternal
    """,
    # Roles, schema, database.
    """
    SELECT 'role', format('ALTER ROLE %I %s', rolname, attribute)
    FROM pg_roles CROSS JOIN unnest(ARRAY['SUPERUSER', 'BYPASSRLS', 'CREATEDB', 'CREATEROLE', 'REPLICATION'])
         AS attribute
    WHERE rolname IN ('settler_app', 'settler_services', 'settler_relay')
    """,
    """
    SELECT 'membership', sql FROM unnest(ARRAY[
        'GRANT settler_services TO settler_app WITH SET TRUE',
        'GRANT settler_relay TO settler_app WITH INHERIT TRUE',
        'GRANT settler_relay TO settler_services',
        'GRANT pg_read_all_data TO settler_app', 'GRANT pg_read_server_files TO settler_app',
        'GRANT pg_execute_server_program TO settler_services', 'GRANT pg_monitor TO settler_app']) AS sql
    """,
    """
    SELECT 'schema or database', sql FROM unnest(ARRAY[
        'GRANT CREATE ON SCHEMA public TO settler_services', 'GRANT USAGE ON SCHEMA public TO PUBLIC',
        format('GRANT TEMPORARY ON DATABASE %I TO settler_services', current_database()),
        format('GRANT CREATE ON DATABASE %I TO settler_app', current_database()),
        format('GRANT CONNECT ON DATABASE %I TO PUBLIC', current_database()),
        'GRANT EXECUTE ON FUNCTION pg_read_file(text) TO settler_services',
        'GRANT EXECUTE ON FUNCTION lo_import(text) TO PUBLIC',
        'ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON ROUTINES TO PUBLIC',
        'ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO settler_services']) AS sql
    """,
)


async def mutants(owner: asyncpg.Connection) -> list[Mutant]:
    """In the order of the generators, sorted within each."""
    found: list[Mutant] = []
    for generator in _GENERATORS:
        found += [Mutant(*row) for row in sorted(await owner.fetch(generator), key=tuple)]
    return found
