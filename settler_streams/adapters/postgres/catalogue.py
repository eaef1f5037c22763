"""Whether the live database isolates tenants, read from its catalogue: a later table cannot forget a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    import asyncpg
    from asyncpg.pool import PoolConnectionProxy

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
    "a permissive policy leaves it to the restrictive ones": """
    SELECT name FROM tenant_tables t WHERE NOT closed AND NOT EXISTS (
        SELECT FROM pg_policy p WHERE p.polrelid = t.oid AND p.polname = 'tenant_rows' AND p.polpermissive
        AND p.polcmd = '*' AND p.polroles = '{0}')
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
    SELECT polrelid::regclass || '.' || polname FROM pg_policy p
    WHERE NOT (polname = 'tenant_rows' AND EXISTS (
        SELECT FROM pg_policy o
        WHERE o.polrelid = p.polrelid AND o.polname = 'tenant_rows_only' AND NOT o.polpermissive))
      AND coalesce(pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)) NOT LIKE '%app.tenant_id%'
    """,
    "positions belong to the platform alone": """
    SELECT relname FROM pg_class c WHERE oid = 'stream_positions'::regclass AND NOT (
        relrowsecurity AND relforcerowsecurity
        AND EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid AND polname = 'platform_rows' AND polcmd = '*'))
    """,
    "a tenant's policies say that and nothing more": """
    SELECT t.name || '.' || says.policy FROM tenant_tables t
    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = t.tenant_column
    CROSS JOIN (VALUES ($$(NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid$$,
                        $$( SELECT (NULLIF(current_setting('app.tenant_id'::text, true), ''::text))::uuid$$
                        || $$ AS "nullif")$$,
                        $$'00000000-0000-0000-0000-000000000000'::uuid$$)) AS in_force (context, context_once, platform)
    CROSS JOIN LATERAL (VALUES (format('(%I = %s)', a.attname, context), format('(%I = %s)', a.attname, context_once),
        $$(%s OR ((CURRENT_USER = '%s'::name) AND (%s = %s)))$$)) AS own (own, own_once, or_role)
    CROSS JOIN LATERAL (VALUES
        (t.name <> 'outbox', 'tenant_rows', '*', 'true', 'true'),
        (t.name NOT IN ('erasures', 'feature_flags', 'outbox', 'tenant_schemas', 'webhook_lanes'),
         'tenant_rows_only', '*', own, own),
        (t.name IN ('erasures', 'tenant_schemas'),
         'tenant_rows_only', '*', format('(%s OR (%s = %s))', own, context, platform), own),
        (t.name = 'feature_flags', 'tenant_rows_only', 'r',
         format('(%1$s OR ((tenant_id = %3$s) AND (%2$s IS NOT NULL)))', own, context, platform), NULL),
        (t.name = 'feature_flags', 'tenant_rows_only_insert', 'a', NULL, own),
        (t.name = 'feature_flags', 'tenant_rows_only_update', 'w', own, own),
        (t.name = 'feature_flags', 'tenant_rows_only_delete', 'd', own, NULL),
        (t.name = 'webhook_lanes', 'tenant_rows_only', '*', format(or_role, own, 'settler_courier', context, platform),
         format(or_role, own, 'settler_courier', context, platform)),
        (t.name = 'outbox', 'tenant_rows', '*', own, own_once),
        (t.name = 'outbox', 'tenant_rows_only', '*',
         format(or_role, own_once, 'settler_relay', context_once, platform), own_once)
    ) AS says (holds, policy, command, seen, written)
    WHERE NOT closed AND says.holds AND NOT EXISTS (
        SELECT FROM pg_policy p
        CROSS JOIN LATERAL (
            SELECT pg_get_expr(p.polqual, t.oid), pg_get_expr(p.polwithcheck, t.oid)) AS found (seen, written)
        WHERE p.polrelid = t.oid AND p.polname = says.policy AND p.polpermissive = (says.policy = 'tenant_rows')
          AND p.polcmd::text = says.command AND p.polroles = '{0}' AND found.seen IS NOT DISTINCT FROM says.seen
          AND (found.written IS NOT DISTINCT FROM says.written OR (says.written, found.written) = (own, own_once)))
    """,
    "a group is joined as was intended": """
    SELECT format('%s in %s', m.member::regrole, g.rolname) FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
    WHERE g.rolname = 'settler_services' AND (m.set_option OR m.inherit_option AND m.admin_option)
       OR g.rolname IN ('settler_relay', 'settler_courier', 'settler_janitor', 'settler_eraser')
          AND (m.inherit_option OR m.set_option AND m.admin_option)
       OR g.rolname NOT IN ('settler_services', 'settler_relay', 'settler_courier', 'settler_janitor', 'settler_eraser')
          AND m.member IN (
          SELECT member FROM pg_auth_members WHERE roleid = 'settler_services'::regrole AND inherit_option
          UNION SELECT oid FROM pg_roles WHERE rolname IN (
                 'settler_services', 'settler_relay', 'settler_courier', 'settler_janitor', 'settler_eraser'))
    """,
    "no inheritance reaches across tables": """
    SELECT inhrelid::regclass::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'f') AND NOT c.relispartition
    """,
    "only the relay and the platform widen": """
    SELECT polrelid::regclass || '.' || polname FROM pg_policy
    WHERE polpermissive AND polname <> 'tenant_rows'
      AND (polrelid::regclass::text, polname::text)
          NOT IN (('outbox', 'relay_rows'), ('stream_positions', 'platform_rows'))
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
                OR proname IN ('create_tenant_schema', 'forget_tenant') AND prorettype = 'void'::regtype)
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
      AND (c.relname, a.privilege_type, a.grantee::regrole::text)
          NOT IN (('audit_logs', 'DELETE', 'settler_janitor'), ('audit_logs', 'DELETE', 'settler_eraser'))
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
    "an erasure reaches every table, and nobody else's rows": """
    SELECT name FROM tenant_tables t
    WHERE NOT closed AND name NOT IN ('tenants', 'tenant_schemas', 'erasures') AND NOT (
        has_table_privilege('settler_eraser', t.oid, 'DELETE')
        AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = t.oid AND p.polname = 'under_erasure'
                    AND NOT p.polpermissive
                    AND p.polcmd = CASE name WHEN 'tenant_children' THEN 'd' ELSE '*' END::"char"
                    AND p.polroles = ARRAY['settler_eraser'::regrole::oid]
                    AND pg_get_expr(p.polqual, t.oid) LIKE '%being_erased()%'
                    AND coalesce(pg_get_expr(p.polwithcheck, t.oid), 'being_erased()') LIKE '%being_erased()%'))
    UNION ALL
    SELECT c.relname || ': ' || a.privilege_type FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
    WHERE c.relnamespace = current_schema()::regnamespace AND a.grantee = 'settler_eraser'::regrole
      AND NOT (a.privilege_type = 'SELECT' OR a.privilege_type = 'INSERT' AND c.relname IN ('outbox', 'erasures')
               OR a.privilege_type = 'DELETE' AND c.relname NOT IN ('tenants', 'tenant_schemas', 'erasures'))
    """,
    "an erasure is begun when it is due, and its record stays": """
    SELECT c.relname || ': ' || a.privilege_type || ' to ' || a.grantee::regrole
    FROM pg_class c CROSS JOIN aclexplode(c.relacl) AS a
    WHERE c.oid = to_regclass('erasures') AND a.grantee <> c.relowner AND a.privilege_type <> 'SELECT'
      AND (a.privilege_type <> 'INSERT' OR a.grantee <> 'settler_eraser'::regrole)
    UNION ALL
    SELECT 'erasures.' || wanted.name
    FROM (VALUES ('only_what_is_due', 'a', '%due_for_erasure()%'),
                 ('only_until_it_has_ended', 'w', '%ended_at IS NULL%'))
         AS wanted (name, command, says)
    WHERE NOT EXISTS (
        SELECT FROM pg_policy p WHERE p.polrelid = 'public.erasures'::regclass AND p.polname = wanted.name
        AND NOT p.polpermissive AND p.polcmd::text = wanted.command AND p.polroles = '{0}'
        AND coalesce(pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)) LIKE wanted.says)
    """,
    "the services' roles own nothing and stand above nothing": """
    SELECT rolname FROM pg_roles r
    WHERE (rolname IN ('settler_services', 'settler_relay', 'settler_courier', 'settler_janitor', 'settler_eraser')
           OR EXISTS (SELECT FROM pg_auth_members
                      WHERE roleid = 'settler_services'::regrole AND member = r.oid AND inherit_option))
      AND (rolsuper OR rolbypassrls OR rolcreatedb OR rolcreaterole OR rolreplication
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

_REMEDIES: Final[dict[str, str]] = {
    "row-level security is enabled and forced": "CALL protect_tenant_table where it is created",
    "a permissive policy leaves it to the restrictive ones": "CALL protect_tenant_table where it is created",
    "restrictive policies bind every role in every command": "CALL protect_tenant_table where it is created",
    "every policy asks for a context": "compare the tenant column with the context in its USING and WITH CHECK",
    "positions belong to the platform alone": "put back what migration 0009 says",
    "a tenant's policies say that and nothing more": "put back what the migrations say",
    "a group is joined as was intended": "REVOKE it and run `settler migrate`",
    "no inheritance reaches across tables": "use a partition; the parent's policies alone would bind",
    "only the relay and the platform widen": "drop it; a parent sees a child by switching context",
    "the tenant column is never NULL": "ALTER COLUMN ... SET NOT NULL; platform-wide rows carry the nil UUID",
    "a primary key leads with the tenant": "make it PRIMARY KEY (tenant_id, ...)",
    "an index leads with the tenant": "make it (tenant_id, ...): a unique one would tell of others' rows",
    "a foreign key carries the tenant": "make it FOREIGN KEY (tenant_id, ...) REFERENCES ... (tenant_id, ...)",
    "a table belongs to tenants or is known not to": "give it a tenant_id and CALL protect_tenant_table",
    "a view runs as its caller": "CREATE VIEW ... WITH (security_invoker = true)",
    "a definer function is reviewed and pins its search path": "make it SECURITY INVOKER",
    "no function is callable by everybody": "REVOKE EXECUTE ... FROM PUBLIC, GRANT it to settler_services",
    "no relation is granted to everybody, nor beyond reading and writing rows": "REVOKE it",
    "audit entries and positions cannot be taken back": "REVOKE it",
    "the janitor deletes what is past its retention": "CREATE POLICY past_retention, as migration 0013 does",
    "an erasure reaches every table, and nobody else's rows": "CALL protect_tenant_table where it is created",
    "an erasure is begun when it is due, and its record stays": "put back what migration 0016 says",
    "the services' roles own nothing and stand above nothing": "change the owner, REVOKE CREATE, run `settler migrate`",
    "money is not a float and a time has a zone": "use bigint minor units, timestamptz",
}

# What has to hold whatever else a later version's migrations add: asked of every database that a service opens.
_ESSENTIAL: Final = (
    "row-level security is enabled and forced",
    "restrictive policies bind every role in every command",
)


def _asked(rules: Iterable[str]) -> str:
    return _TENANT_TABLES + " UNION ALL ".join(
        f"SELECT $rule${rule}$rule$::text, found.name::text FROM ({_RULES[rule]}) AS found (name)"  # noqa: S608
        for rule in rules
    )


_ALL_RULES: Final = _asked(_RULES)
_ESSENTIAL_RULES: Final = _asked(_ESSENTIAL)


async def violations(
    connection: asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record], *, essential: bool = False
) -> list[str]:
    """What breaks the rules in the current schema, as ``rule: object; what to do``; empty when tenants are isolated.

    Args:
        connection: any role may ask; the catalogue hides nothing that the rules need.
        essential: ask only what holds in every version's schema: whether row-level security is on and forced, and
            restrictive policies that name the context bind every command.
    """
    asked = _ESSENTIAL_RULES if essential else _ALL_RULES
    return [f"{rule}: {name}; {_REMEDIES[rule]}" for rule, name in await connection.fetch(asked)]
