"""Every way to weaken isolation by one step, generated from the live catalogue: a later table has its own.

They are of the current schema: of the one that all tenants share, or of a tenant's own when that stands first in the
search path, where the same names mean its tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import asyncpg


class Mutant(NamedTuple):
    """``kind`` is what it weakens, ``sql`` how, in a transaction of the owner."""

    kind: str
    sql: str


# Each yields (kind, statements). `policies` are the schema's own, `roles` those that work beside settler_services.
_GIVEN = """
WITH policies AS (
    SELECT p.* FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
    WHERE c.relnamespace = current_schema()::regnamespace
), relations AS (
    SELECT oid, relname, row_number() OVER (ORDER BY relname) AS place FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v')
), roles (name, place) AS (
    VALUES ('settler_relay', 0), ('settler_courier', 1), ('settler_janitor', 2), ('settler_eraser', 3)
)
"""
_OF_A_SCHEMA = (
    # Row-level security.
    """
    SELECT v.kind, format('ALTER TABLE %I %s', c.relname, v.sql)
    FROM pg_class c CROSS JOIN (VALUES ('enable', 'DISABLE ROW LEVEL SECURITY'),
                                       ('force', 'NO FORCE ROW LEVEL SECURITY')) AS v (kind, sql)
    WHERE relnamespace = current_schema()::regnamespace AND c.relrowsecurity
      AND (v.kind = 'enable' OR c.relforcerowsecurity)
    """,
    # Policies: dropped, widened to everything, widened to everyone who has some context.
    """
    SELECT CASE WHEN polpermissive THEN 'policy' ELSE 'restrictive policy' END || ' ' || v.kind,
           format('%s POLICY %I ON %s %s', CASE v.kind WHEN 'dropped' THEN 'DROP' ELSE 'ALTER' END,
                  polname, polrelid::regclass, v.sql)
    FROM policies CROSS JOIN (VALUES
        ('dropped', ''), ('reads all', 'USING (true)'), ('writes all', 'WITH CHECK (true)'),
        ('reads all in a context', $$USING (current_setting('app.tenant_id', true) <> '')$$),
        ('writes all in a context', $$WITH CHECK (current_setting('app.tenant_id', true) <> '')$$)) AS v (kind, sql)
    WHERE v.kind = 'dropped' OR v.kind LIKE 'reads%' AND pg_get_expr(polqual, polrelid) <> 'true'
       OR v.kind LIKE 'writes%' AND pg_get_expr(polwithcheck, polrelid) <> 'true'
    """,
    # Binding other roles than were meant: a permissive one everybody, a restrictive one nobody who works here.
    """
    SELECT CASE WHEN polpermissive THEN 'policy' ELSE 'restrictive policy' END || ' of other roles',
           format('ALTER POLICY %I ON %s TO %s', polname, polrelid::regclass,
                  CASE WHEN polpermissive THEN 'PUBLIC' ELSE 'pg_monitor' END)
    FROM policies WHERE NOT polpermissive OR polroles <> '{0}'
    """,
    # All of a table's at once.
    """
    SELECT 'all policies', string_agg(format('ALTER POLICY %I ON %s %s %s', polname, polrelid::regclass,
        CASE WHEN polqual IS NOT NULL THEN 'USING (true)' END,
        CASE WHEN polwithcheck IS NOT NULL THEN 'WITH CHECK (true)' END), '; ')
    FROM policies WHERE polrelid <> 'stream_positions'::regclass GROUP BY polrelid
    """,
    # Grants that are withheld.
    """
    SELECT 'grant', format('GRANT %s ON %I TO settler_services', privilege, relname)
    FROM pg_class CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER',
                                          'MAINTAIN']) AS privilege
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v')
      AND NOT has_table_privilege('settler_services', oid, privilege)
    """,
    """
    SELECT DISTINCT ON (relname) 'grant option', format('GRANT %s ON %I TO %s WITH GRANT OPTION', a.privilege_type,
                                                        relname, a.grantee::regrole)
    FROM pg_class c CROSS JOIN aclexplode(relacl) AS a
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v') AND a.grantee <> c.relowner
    ORDER BY relname, hashtext(concat(relname, a.grantee::regrole, a.privilege_type))
    """,
    # Of each relation to two of the other roles one of those that they have not, in turn; and a column to one of them.
    """
    SELECT 'grant to another role', format('GRANT %s ON %I TO %s', privilege, relname, role)
    FROM (
        SELECT r.relname, o.name AS role, p.privilege,
               row_number() OVER withheld
               = 1 + (r.place / 4 + o.place) % count(*) OVER (PARTITION BY r.oid, o.name) AS turn
        FROM relations r JOIN roles o ON (o.place + r.place) % 2 = 0
        CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER',
                                'MAINTAIN']) WITH ORDINALITY AS p (privilege, place)
        WHERE NOT has_table_privilege(o.name, r.oid, p.privilege)
        WINDOW withheld AS (PARTITION BY r.oid, o.name ORDER BY p.place)
    ) AS withheld WHERE turn
    """,
    """
    SELECT DISTINCT ON (r.relname) 'grant of a column to another role',
           format('GRANT %s (%I) ON %I TO %s', privilege, a.attname, r.relname, o.name)
    FROM relations r JOIN roles o ON o.place = r.place % 4 JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0
    CROSS JOIN unnest(ARRAY['UPDATE', 'SELECT']) AS privilege
    WHERE NOT a.attisdropped AND NOT has_column_privilege(o.name, r.oid, a.attnum, privilege)
    ORDER BY r.relname, privilege DESC, a.attnum
    """,
    """
    SELECT DISTINCT ON (p.oid) 'function for another role',
           format('GRANT EXECUTE ON ROUTINE %s TO %s', p.oid::regprocedure, o.name)
    FROM pg_proc p CROSS JOIN (SELECT name, place FROM roles UNION ALL VALUES ('settler_services', 4)) AS o
    WHERE pronamespace = current_schema()::regnamespace AND NOT has_function_privilege(o.name, p.oid, 'EXECUTE')
    ORDER BY p.oid, (o.place + abs(hashtext(proname))) % 5
    """,
    """
    SELECT 'owner', format('ALTER TABLE %I OWNER TO %s', r.relname, o.name)
    FROM relations r JOIN roles o ON o.place = r.place % 4
    """,
    """
    SELECT 'grant to everybody', format('GRANT SELECT ON %I TO PUBLIC', relname)
    FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v', 'S')
    """,
    """
    SELECT 'grant of a column', format('GRANT %s (%I) ON %s TO settler_services', privilege, attname,
                                       attrelid::regclass)
    FROM pg_attribute JOIN pg_class c ON c.oid = attrelid CROSS JOIN unnest(ARRAY['SELECT', 'UPDATE']) AS privilege
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p') AND attnum > 0 AND NOT attisdropped
      AND NOT has_column_privilege('settler_services', attrelid, attnum, privilege)
    """,
    """
    SELECT v.kind, format(v.sql, oid::regprocedure) FROM pg_proc CROSS JOIN (VALUES
        ('function for everybody', 'GRANT EXECUTE ON ROUTINE %s TO PUBLIC'),
        ('definer function', 'ALTER ROUTINE %s SECURITY DEFINER'),
        ('definer search path', 'ALTER ROUTINE %s RESET search_path')) AS v (kind, sql)
    WHERE pronamespace = current_schema()::regnamespace
      AND CASE v.kind WHEN 'definer function' THEN NOT prosecdef WHEN 'definer search path' THEN prosecdef ELSE true END
    """,
    # Keys. Without the tenant: a unique key says whether another's value exists, a foreign key accepts another's row.
    """
    SELECT 'unique key', format('ALTER TABLE %1$s DROP CONSTRAINT %2$I CASCADE; ALTER TABLE %1$s ADD UNIQUE (%3$s)',
        conrelid::regclass, conname,
        (SELECT string_agg(quote_ident(attname), ', ' ORDER BY array_position(conkey, attnum)) FROM pg_attribute
         WHERE attrelid = conrelid AND attnum = ANY (conkey) AND attname <> 'tenant_id'))
    FROM pg_constraint WHERE connamespace = current_schema()::regnamespace AND contype IN ('p', 'u')
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
    WHERE connamespace = current_schema()::regnamespace AND contype = 'f' AND cardinality(conkey) > 1
    """,
    """
    SELECT 'constraint dropped', format('ALTER TABLE %s DROP CONSTRAINT %I CASCADE', conrelid::regclass, conname)
    FROM pg_constraint
    WHERE connamespace = current_schema()::regnamespace AND contype IN ('f', 'p', 'u') AND conrelid <> 0
    """,
    """
    SELECT 'tenant may be NULL', format('ALTER TABLE %1$s DROP CONSTRAINT %2$I CASCADE; '
                                        'ALTER TABLE %1$s ALTER tenant_id DROP NOT NULL', conrelid::regclass, conname)
    FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attname = 'tenant_id' AND attnum = ANY (conkey)
    WHERE connamespace = current_schema()::regnamespace AND contype = 'p'
    """,
    """
    SELECT 'security_invoker', format('ALTER VIEW %I SET (security_invoker = false)', relname)
    FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'v'
    """,
    """
    SELECT 'trigger', format('ALTER TABLE %s DISABLE TRIGGER %I', tgrelid::regclass, tgname)
    FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid
    WHERE NOT tgisinternal AND relnamespace = current_schema()::regnamespace
    """,
    # What nobody has reviewed.
    """
    SELECT 'something more', sql FROM unnest(ARRAY[
        'CREATE TABLE later (tenant_id uuid PRIMARY KEY)', 'CREATE TABLE later (id uuid PRIMARY KEY)',
        'CREATE TABLE later () INHERITS (jobs)', 'CREATE MATERIALIZED VIEW later AS SELECT * FROM users',
        'CREATE VIEW later AS SELECT * FROM users', 'CREATE SEQUENCE later',
        'CREATE RULE later AS ON DELETE TO jobs DO INSTEAD NOTHING',
        'CREATE FUNCTION later() RETURNS bigint LANGUAGE sql SECURITY DEFINER RETURN 1']) AS sql
    """,
    """
    SELECT 'schema', format('GRANT %s ON SCHEMA %I TO %s', privilege, current_schema(), grantee)
    FROM unnest(ARRAY['USAGE', 'CREATE']) AS privilege
    CROSS JOIN (SELECT name FROM roles UNION ALL VALUES ('settler_services'), ('PUBLIC')) AS given (grantee)
    WHERE NOT has_schema_privilege(lower(grantee), current_schema(), privilege)
    """,
    """
    SELECT 'schema', format('ALTER DEFAULT PRIVILEGES IN SCHEMA %I GRANT SELECT ON TABLES TO settler_services',
                            current_schema())
    """,
)

_OF_THE_SERVER = (
    """
    SELECT 'role', format('ALTER ROLE %I %s', rolname, attribute)
    FROM pg_roles CROSS JOIN unnest(ARRAY['SUPERUSER', 'BYPASSRLS', 'CREATEDB', 'CREATEROLE', 'REPLICATION'])
         AS attribute
    WHERE rolname IN ('settler_app', 'settler_services') OR rolname IN (SELECT name FROM roles)
    """,
    """
    SELECT 'membership', format(sql, name) FROM roles CROSS JOIN unnest(ARRAY[
        'GRANT %s TO settler_app WITH INHERIT TRUE', 'GRANT %s TO settler_services',
        'GRANT settler_services TO %s WITH INHERIT TRUE, SET FALSE', 'GRANT pg_read_all_data TO %s']) AS sql
    """,
    """
    SELECT 'membership', format('GRANT %s TO %s', r.name, other.name)
    FROM roles r JOIN roles other ON other.place = (r.place + 1) % 4
    """,
    """
    SELECT 'membership', sql FROM unnest(ARRAY[
        'GRANT settler_services TO settler_app WITH SET TRUE',
        'GRANT pg_read_all_data TO settler_app', 'GRANT pg_read_server_files TO settler_app',
        'GRANT pg_execute_server_program TO settler_services', 'GRANT pg_monitor TO settler_app']) AS sql
    """,
    """
    SELECT 'database', sql FROM unnest(ARRAY[
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
    """Of the current schema, of the roles and of the database; in the order of the generators, sorted within each."""
    return await _made(owner, (*_OF_A_SCHEMA, *_OF_THE_SERVER))


async def schema_mutants(owner: asyncpg.Connection) -> list[Mutant]:
    """Those of the current schema alone."""
    return await _made(owner, _OF_A_SCHEMA)


async def _made(owner: asyncpg.Connection, generators: Sequence[str]) -> list[Mutant]:
    found: list[Mutant] = []
    for generator in generators:
        found += [Mutant(*row) for row in sorted(await owner.fetch(_GIVEN + generator), key=tuple)]
    return found
