"""Whether the live database isolates tenants, read from its catalogue: a later table cannot forget a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncpg

# Stands before every rule. A tenant table is one with a column tenant_id, or `tenants` itself, whose tenant column is
# id. A closed table has row-level security without a policy and grants nothing to the services: nobody but its owner
# sees a row.
_TENANT_TABLES: Final = """
WITH tenant_tables AS (
    SELECT c.oid, c.relname AS name, c.relrowsecurity, c.relforcerowsecurity, a.attnum AS tenant_column, a.attnotnull,
           NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid)
           AND c.relrowsecurity
           AND NOT EXISTS (
               SELECT FROM aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) WHERE grantee <> c.relowner
           ) AS closed
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p')
      AND a.attname = CASE c.relname WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END
)
"""

_RULES: Final[dict[str, str]] = {
    "row-level security is enabled and forced": """
    SELECT name FROM tenant_tables WHERE NOT closed AND NOT (relrowsecurity AND relforcerowsecurity)
    """,
    "a permissive policy compares with the context": """
    SELECT name FROM tenant_tables t WHERE NOT closed AND NOT EXISTS (
        SELECT FROM pg_policy p WHERE p.polrelid = t.oid AND p.polpermissive AND p.polcmd = '*' AND p.polroles = '{0}'
        AND pg_get_expr(p.polqual, t.oid) LIKE '%app.tenant_id%'
        AND pg_get_expr(p.polwithcheck, t.oid) LIKE '%app.tenant_id%')
    """,
    "restrictive policies bind every role in every command": """
    SELECT name || ' (' || command || ')' FROM tenant_tables t
    CROSS JOIN unnest(ARRAY['r', 'a', 'w', 'd']) AS command
    WHERE NOT closed AND NOT EXISTS (
        SELECT FROM pg_policy p WHERE p.polrelid = t.oid AND NOT p.polpermissive AND p.polroles = '{0}'
        AND (p.polcmd::text = '*' OR p.polcmd::text = command)
        AND (command = 'a' OR pg_get_expr(p.polqual, t.oid) LIKE '%app.tenant_id%')
        AND (command IN ('r', 'd') OR pg_get_expr(p.polwithcheck, t.oid) LIKE '%app.tenant_id%'))
    """,
    "every policy asks for a context": """
    SELECT polrelid::regclass || '.' || polname FROM pg_policy
    WHERE coalesce(pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)) NOT LIKE '%app.tenant_id%'
    """,
    "positions belong to the platform alone": """
    SELECT relname FROM pg_class c WHERE oid = 'stream_positions'::regclass AND NOT (
        relrowsecurity AND relforcerowsecurity
        AND EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid AND polname = 'platform_rows' AND polcmd = '*'))
    """,
    "only feature_flags, the relay and the courier widen": """
    SELECT polrelid::regclass || '.' || polname FROM pg_policy
    WHERE polpermissive AND polname <> 'tenant_rows'
      AND (polrelid::regclass::text, polname::text)
          NOT IN (('feature_flags', 'platform_rows'), ('outbox', 'relay_rows'), ('stream_positions', 'platform_rows'),
                  ('webhook_lanes', 'courier_rows'))
    """,
    "the tenant column is never NULL": "SELECT name FROM tenant_tables WHERE NOT attnotnull",
    "a primary key leads with the tenant": """
    SELECT name FROM tenant_tables t WHERE NOT closed AND NOT EXISTS (
        SELECT FROM pg_index i WHERE i.indrelid = t.oid AND i.indisprimary AND i.indkey[0] = t.tenant_column)
    """,
    "an index leads with the tenant": """
    SELECT i.indexrelid::regclass::text FROM tenant_tables t JOIN pg_index i ON i.indrelid = t.oid
    WHERE NOT closed AND i.indkey[0] <> t.tenant_column
    """,
    "a foreign key carries the tenant": """
    SELECT f.conrelid::regclass || '.' || f.conname FROM pg_constraint f
    JOIN tenant_tables t ON t.oid = f.conrelid
    LEFT JOIN tenant_tables target ON target.oid = f.confrelid
    WHERE f.contype = 'f' AND (f.conrelid <> 'tenants'::regclass OR f.confrelid <> 'tenants'::regclass)
      AND NOT EXISTS (
          SELECT FROM unnest(f.conkey, f.confkey) AS pair (source, target)
          WHERE pair.source = t.tenant_column AND pair.target = target.tenant_column)
    """,
    "a table belongs to tenants or is known not to": """
    SELECT relname FROM pg_class c
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'f', 'm')
      AND oid NOT IN (SELECT oid FROM tenant_tables) AND relname NOT IN ('schema_migrations', 'stream_positions')
    """,
    "a view runs as its caller": """
    SELECT relname FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind = 'v'
      AND NOT coalesce(reloptions, '{}') @> '{security_invoker=true}'
    """,
    "a definer function is reviewed and pins its search path": """
    SELECT oid::regprocedure::text FROM pg_proc
    WHERE pronamespace = current_schema()::regnamespace AND prosecdef
      AND NOT ((proname = 'register_slug' AND prorettype = 'trigger'::regtype
                OR proname = 'create_tenant_schema' AND prorettype = 'void'::regtype)
               AND pronargs = 0 AND array_to_string(proconfig, ',') LIKE 'search_path=%pg_temp')
    """,
    "no function is callable by everybody": """
    SELECT p.oid::regprocedure::text
    FROM pg_proc p CROSS JOIN aclexplode(coalesce(proacl, acldefault('f', proowner))) AS a
    WHERE pronamespace = current_schema()::regnamespace AND a.grantee = 0
    """,
    "no relation is granted to everybody, nor beyond reading and writing rows": """
    SELECT c.relname || ': ' || a.privilege_type || ' to ' || CASE a.grantee WHEN 0 THEN 'PUBLIC'
           ELSE a.grantee::regrole::text END
    FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
    WHERE c.relnamespace = current_schema()::regnamespace AND a.grantee <> c.relowner
      AND (a.grantee = 0 OR a.privilege_type NOT IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE'))
    """,
    "audit entries and positions cannot be taken back": """
    SELECT c.relname || ': ' || a.privilege_type || ' to ' || a.grantee::regrole
    FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
    WHERE c.relnamespace = current_schema()::regnamespace AND a.grantee <> c.relowner
      AND (c.relname, a.privilege_type) IN (
          ('audit_logs', 'UPDATE'), ('audit_logs', 'DELETE'), ('stream_positions', 'DELETE'))
      AND (c.relname, a.privilege_type, a.grantee::regrole::text) <> ('audit_logs', 'DELETE', 'settler_janitor')
    UNION ALL
    SELECT 'audit_logs.' || attname FROM pg_attribute WHERE attrelid = 'audit_logs'::regclass AND attacl IS NOT NULL
    """,
    "the janitor deletes what is past its retention": """
    SELECT c.relname FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
    WHERE c.relnamespace = current_schema()::regnamespace AND a.grantee = 'settler_janitor'::regrole
      AND a.privilege_type = 'DELETE' AND c.relname NOT IN ('matches', 'unmatched', 'reports')
      AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'past_retention'
                      AND NOT p.polpermissive AND p.polcmd = 'd' AND p.polroles = ARRAY[a.grantee]
                      AND pg_get_expr(p.polqual, c.oid) LIKE '%kept_since%')
    """,
    "the services' roles own nothing and stand above nothing": """
    SELECT rolname FROM pg_roles r
    WHERE (rolname IN ('settler_services', 'settler_relay', 'settler_courier', 'settler_janitor')
           OR EXISTS (SELECT FROM pg_auth_members
                      WHERE roleid = 'settler_services'::regrole AND member = r.oid AND inherit_option))
      AND (rolsuper OR rolbypassrls OR rolcreatedb OR rolcreaterole
           OR EXISTS (SELECT FROM pg_class WHERE relowner = r.oid)
           OR EXISTS (SELECT FROM pg_proc WHERE proowner = r.oid)
           OR has_schema_privilege(r.oid, current_schema(), 'CREATE'))
    """,
    "money is not a float and a time has a zone": """
    SELECT a.attrelid::regclass || '.' || a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p') AND a.attnum > 0
      AND (a.atttypid IN ('real'::regtype, 'double precision'::regtype, 'numeric'::regtype, 'money'::regtype,
                          'timestamp without time zone'::regtype)
           OR a.attname LIKE '%\\_minor' AND a.atttypid <> 'bigint'::regtype)
    """,
}


async def violations(connection: asyncpg.Connection[asyncpg.Record]) -> list[str]:
    """What breaks the rules in the current schema, as ``rule: object``; empty when every tenant is isolated.

    Args:
        connection: any role may ask; the catalogue hides nothing that the rules need.
    """
    found: list[str] = []
    for rule, query in _RULES.items():
        found += [f"{rule}: {row[0]}" for row in await connection.fetch(_TENANT_TABLES + query)]
    return found
