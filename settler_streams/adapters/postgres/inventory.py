"""Everything in the live database that decides who sees what, line by line, against what a person has reviewed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from settler_streams.published import MIGRATIONS

if TYPE_CHECKING:
    import asyncpg

REVIEWED: Final = MIGRATIONS / "reviewed.txt"
"""What the migrations leave behind, sorted. A migration that changes it changes this file in the same commit."""

# Names differ from one installation to the next, their parts do not: the database's owner is "owner", whoever inherits
# from settler_services "login".
_ROLES: Final = """
WITH here AS (SELECT current_schema()::regnamespace::oid),
this_database AS (SELECT oid FROM pg_database WHERE datname = current_database()),
role AS (
    SELECT r.oid, CASE
        WHEN r.oid = (SELECT datdba FROM pg_database WHERE datname = current_database()) THEN 'owner'
        WHEN EXISTS (SELECT FROM pg_auth_members WHERE member = r.oid AND inherit_option
                     AND roleid = (SELECT oid FROM pg_roles WHERE rolname = 'settler_services')) THEN 'login'
        ELSE r.rolname::text END AS name
    FROM pg_roles r
    UNION ALL SELECT 0, 'PUBLIC'
)
"""

_FACTS: Final[tuple[str, ...]] = (
    # Tables, partitions, views, materialised views, sequences, foreign tables.
    """
    SELECT format('%s %s of %s: row security %s, forced %s, options %s, persistence %s',
                  CASE c.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
                  WHEN 'm' THEN 'materialised view' WHEN 'S' THEN 'sequence' ELSE 'relation ' || c.relkind::text END,
                  c.relname, r.name, c.relrowsecurity, c.relforcerowsecurity, coalesce(c.reloptions, '{}'),
                  c.relpersistence)
    FROM pg_class c JOIN role r ON r.oid = c.relowner
    WHERE c.relnamespace = (TABLE here) AND c.relkind NOT IN ('i', 'I', 'c', 't')
    """,
    """
    SELECT format('inheritance %s of %s', inhrelid::regclass, inhparent::regclass)
    FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE c.relnamespace = (TABLE here) AND c.relkind IN ('r', 'p')
    """,
    """
    SELECT format('view %s reads %s', relname, regexp_replace(pg_get_viewdef(oid), '\\s+', ' ', 'g'))
    FROM pg_class WHERE relnamespace = (TABLE here) AND relkind IN ('v', 'm')
    """,
    """
    SELECT format('policy %s on %s: %s for %s to %s using %s with check %s', p.polname, c.relname,
                  CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END, p.polcmd,
                  (SELECT string_agg(r.name, ', ' ORDER BY r.name) FROM role r WHERE r.oid = ANY (p.polroles)),
                  regexp_replace(pg_get_expr(p.polqual, c.oid), '\\s+', ' ', 'g'),
                  regexp_replace(pg_get_expr(p.polwithcheck, c.oid), '\\s+', ' ', 'g'))
    FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid WHERE c.relnamespace = (TABLE here)
    """,
    """
    SELECT format('constraint %s on %s: %s%s', n.conname, n.conrelid::regclass, pg_get_constraintdef(n.oid),
                  CASE WHEN n.convalidated THEN '' ELSE ' (not validated)' END)
    FROM pg_constraint n WHERE n.connamespace = (TABLE here) AND n.conrelid <> 0
      AND n.contype IN ('p', 'u', 'f', 'x', 'c')
    """,
    """
    SELECT 'index ' || regexp_replace(pg_get_indexdef(i.indexrelid), '\\s+', ' ', 'g')
    FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
    WHERE c.relnamespace = (TABLE here)
    """,
    """
    SELECT format('trigger %s (%s): %s', t.tgname, t.tgenabled, pg_get_triggerdef(t.oid))
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE NOT t.tgisinternal AND c.relnamespace = (TABLE here)
    """,
    """
    SELECT format('rule %s on %s', w.rulename, c.relname)
    FROM pg_rewrite w JOIN pg_class c ON c.oid = w.ev_class
    WHERE c.relnamespace = (TABLE here) AND w.rulename <> '_RETURN'
    """,
    """
    SELECT format('function %s of %s in %s: %s, leakproof %s, settings %s, source %s', p.oid::regprocedure, r.name,
                  l.lanname, CASE WHEN p.prosecdef THEN 'SECURITY DEFINER' ELSE 'security invoker' END, p.proleakproof,
                  coalesce(p.proconfig, '{}'), md5(p.prosrc || coalesce(pg_get_function_sqlbody(p.oid), '')))
    FROM pg_proc p JOIN role r ON r.oid = p.proowner JOIN pg_language l ON l.oid = p.prolang
    WHERE p.pronamespace = (TABLE here)
    """,
    # Grants: relations, columns, functions, schemas, the database, defaults for what comes later.
    """
    SELECT format('grant %s on %s to %s%s', a.privilege_type, c.relname, r.name,
                  CASE WHEN a.is_grantable THEN ' with grant option' ELSE '' END)
    FROM pg_class c CROSS JOIN aclexplode(c.relacl) a JOIN role r ON r.oid = a.grantee
    WHERE c.relnamespace = (TABLE here) AND a.grantee <> c.relowner
    """,
    """
    SELECT format('grant %s (%s) on %s to %s%s', a.privilege_type, t.attname, c.relname, r.name,
                  CASE WHEN a.is_grantable THEN ' with grant option' ELSE '' END)
    FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid CROSS JOIN aclexplode(t.attacl) a
    JOIN role r ON r.oid = a.grantee WHERE c.relnamespace = (TABLE here) AND a.grantee <> c.relowner
    """,
    """
    SELECT format('grant EXECUTE on %s to %s%s', p.oid::regprocedure, r.name,
                  CASE WHEN a.is_grantable THEN ' with grant option' ELSE '' END)
    FROM pg_proc p CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
    JOIN role r ON r.oid = a.grantee WHERE p.pronamespace = (TABLE here) AND a.grantee <> p.proowner
    """,
    """
    SELECT format('grant %s on schema %s to %s', a.privilege_type,
                  CASE WHEN n.oid = (TABLE here) THEN 'of the tables' ELSE n.nspname END, r.name)
    FROM pg_namespace n CROSS JOIN aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
    JOIN role r ON r.oid = a.grantee WHERE n.nspname !~ '^pg_(toast|temp)' AND a.grantee <> n.nspowner
    """,
    """
    SELECT format('grant %s on database to %s', a.privilege_type, r.name)
    FROM pg_database d CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
    JOIN role r ON r.oid = a.grantee WHERE d.oid = (TABLE this_database) AND a.grantee <> d.datdba
    """,
    """
    SELECT format('default grant of %s in %s: %s of %s to %s', o.name,
                  coalesce(nullif(d.defaclnamespace, 0)::regnamespace::text, 'every schema'), a.privilege_type,
                  d.defaclobjtype, r.name)
    FROM pg_default_acl d CROSS JOIN aclexplode(d.defaclacl) a JOIN role r ON r.oid = a.grantee
    JOIN role o ON o.oid = d.defaclrole
    """,
    # What initdb closed and somebody opened, as pg_read_file(text) to everybody.
    """
    SELECT format('system %s: %s to %s', p.oid::regprocedure, a.privilege_type, r.name)
    FROM pg_proc p CROSS JOIN aclexplode(p.proacl) a JOIN role r ON r.oid = a.grantee
    LEFT JOIN pg_init_privs i ON i.objoid = p.oid AND i.classoid = 'pg_proc'::regclass
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proacl IS DISTINCT FROM i.initprivs
    """,
    """
    SELECT format('system %s: %s to %s', c.oid::regclass, a.privilege_type, r.name)
    FROM pg_class c CROSS JOIN aclexplode(c.relacl) a JOIN role r ON r.oid = a.grantee
    LEFT JOIN pg_init_privs i ON i.objoid = c.oid AND i.classoid = 'pg_class'::regclass AND i.objsubid = 0
    WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.relacl IS DISTINCT FROM i.initprivs
    """,
    """
    SELECT format('grant %s on parameter %s to %s', a.privilege_type, p.parname, r.name)
    FROM pg_parameter_acl p CROSS JOIN aclexplode(p.paracl) a JOIN role r ON r.oid = a.grantee WHERE a.grantee <> 10
    """,
    # Whole features that would be doors of their own.
    "SELECT 'extension ' || extname FROM pg_extension",
    "SELECT 'publication ' || pubname FROM pg_publication",
    "SELECT 'subscription ' || subname FROM pg_subscription WHERE subdbid = (TABLE this_database)",
    "SELECT 'event trigger ' || evtname FROM pg_event_trigger",
    "SELECT 'foreign server ' || srvname FROM pg_foreign_server",
    "SELECT format('language %s, trusted %s', lanname, lanpltrusted) FROM pg_language",
    """
    SELECT format('setting of %s: %s', r.name, array_to_string(s.setconfig, ', '))
    FROM pg_db_role_setting s JOIN role r ON r.oid = s.setrole
    WHERE s.setdatabase IN (0, (TABLE this_database)) AND r.name IN
          ('PUBLIC', 'login', 'settler_services', 'settler_relay', 'settler_courier', 'settler_janitor',
           'settler_eraser')
    """,
)

_INVENTORY: Final = _ROLES + " UNION ".join(_FACTS)


async def inventory(connection: asyncpg.Connection[asyncpg.Record]) -> list[str]:
    """Every fact about the current schema, one line each, sorted."""
    return sorted(row[0] for row in await connection.fetch(_INVENTORY))


async def differences(connection: asyncpg.Connection[asyncpg.Record]) -> list[str]:
    """What stands in the database and was not reviewed, or was reviewed and is gone; empty when nothing differs."""
    reviewed = set(REVIEWED.read_text(encoding="utf-8").splitlines())
    live = set(await inventory(connection))
    return [
        f"{line}: not reviewed; take it back, or review it and write it into {REVIEWED.name}"
        for line in sorted(live - reviewed)
    ] + [
        f"{line}: reviewed but gone; put it back, or review that it went and take it out of {REVIEWED.name}"
        for line in sorted(reviewed - live)
    ]
