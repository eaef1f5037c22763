"""Every SQL text that the services send; the statements a migration runs stand in ``schemas/postgres/``."""

from __future__ import annotations

from typing import Final

# The tenant's context

# The role, too: behind a transaction-mode pooler, a session may have kept what a careless transaction had set in it.
SET_CONTEXT: Final = "SELECT set_config('role', 'none', true), public.enter_tenant($1::text::uuid)"
OPEN_CONTEXT: Final = "SELECT public.open_tenant($1::text::uuid)"
ENTER_ERASURE: Final = "SELECT public.enter_erasure($1::text::uuid)"
READ_CONTEXT: Final = "SELECT NULLIF(current_setting('app.tenant_id', true), '')"
# Whether tables are found where the context's rows lie now. A schema that is gone is passed over by itself.
IS_IN_PLACE: Final = """
SELECT current_schema() = COALESCE((
    SELECT schema_name FROM public.tenant_schemas
    WHERE tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid), 'public')
"""
READ_LEFTOVERS: Final = """
SELECT concat_ws(', ', 'tenant ' || NULLIF(current_setting('app.tenant_id', true), ''),
                 'role ' || NULLIF(current_user, session_user))
"""
BECOME_RELAY: Final = "SET LOCAL ROLE settler_relay"
BECOME_COURIER: Final = "SET LOCAL ROLE settler_courier"
BECOME_JANITOR: Final = "SET LOCAL ROLE settler_janitor"
BECOME_ERASER: Final = "SET LOCAL ROLE settler_eraser"

LOGIN_PRIVILEGES: Final = """
SELECT current_user AS login,
       coalesce(bool_or(rolsuper), false) AS superuser,
       coalesce(bool_or(rolbypassrls), false) AS bypasses_rls,
       EXISTS (
           SELECT FROM pg_class
           WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
             AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
             AND relnamespace::regnamespace::text !~ '^pg_(toast|temp)'
             AND pg_has_role(current_user, relowner, 'MEMBER')
       ) AS owns_relations
FROM pg_roles
WHERE pg_has_role(current_user, oid, 'MEMBER')
"""

# Stream positions

MOVE_POSITION: Final = """
UPDATE stream_positions SET next_offset = $5, updated_at = now()
WHERE consumer = $1 AND topic_id = $2 AND partition = $3 AND next_offset = $4
RETURNING true
"""
READ_POSITIONS: Final = """
SELECT topic_id, topic, partition, next_offset FROM stream_positions
WHERE consumer = $1 ORDER BY topic, partition, topic_id
"""
INSERT_POSITION: Final = """
INSERT INTO stream_positions (consumer, topic_id, topic, partition, next_offset) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (consumer, topic_id, partition) DO NOTHING
"""
READ_POSITION: Final = """
SELECT topic_id, next_offset FROM stream_positions WHERE consumer = $1 AND topic = $2 AND partition = $3
"""

# Projection and results

PROJECT_BATCH: Final = "SELECT project_batch($1::text::jsonb)"

LOCK_ATTEMPT: Final = "SELECT pg_advisory_xact_lock(hashtextextended($1 || '/' || $2 || '/' || $3, 0))"
DELETE_ATTEMPT: Final = """
WITH m AS (DELETE FROM matches WHERE tenant_id = $1 AND job_id = $2 AND attempt = $3),
     u AS (DELETE FROM unmatched WHERE tenant_id = $1 AND job_id = $2 AND attempt = $3)
DELETE FROM reports WHERE tenant_id = $1 AND job_id = $2 AND attempt = $3
"""

INSERT_MATCHES: Final = """
INSERT INTO matches (tenant_id, job_id, attempt, match_no, kind, left_id, right_ids, left_currency, right_currency,
                     left_amount_minor, right_amount_minor, difference_minor)
SELECT $1, $2, $3, $4::bigint + r.ordinality, r.kind, r.left_id,
       ARRAY(SELECT jsonb_array_elements_text(r.right_ids)), r.left_currency, r.right_currency,
       r.left_amount_minor, r.right_amount_minor, r.difference_minor
FROM unnest($5::text[], $6::text[], $7::jsonb[], $8::text[], $9::text[], $10::bigint[], $11::bigint[], $12::bigint[])
     WITH ORDINALITY AS r (kind, left_id, right_ids, left_currency, right_currency,
                           left_amount_minor, right_amount_minor, difference_minor)
"""
INSERT_UNMATCHED: Final = """
INSERT INTO unmatched (tenant_id, job_id, attempt, row_no, side, record_no, record_id, currency, amount_minor,
                       record_date, reason, detail)
SELECT $1, $2, $3, $4::bigint + r.ordinality, r.side, r.record_no, r.record_id, r.currency, r.amount_minor,
       r.record_date, r.reason, r.detail
FROM unnest($5::text[], $6::bigint[], $7::text[], $8::text[], $9::bigint[], $10::date[], $11::text[], $12::text[])
     WITH ORDINALITY AS r (side, record_no, record_id, currency, amount_minor, record_date, reason, detail)
"""
INSERT_REPORT: Final = """
INSERT INTO reports (tenant_id, job_id, attempt, currency, matches,
                     left_rows, left_rows_matched, left_rows_unmatched,
                     left_total_minor, left_matched_minor, left_unmatched_minor,
                     right_rows, right_rows_matched, right_rows_unmatched,
                     right_total_minor, right_matched_minor, right_unmatched_minor)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
"""

# Outbox

APPEND_EVENT: Final = "INSERT INTO outbox (tenant_id, topic, key, event) VALUES ($1, $2, $3, $4)"
ONE_RELAY: Final = "SELECT pg_try_advisory_xact_lock(hashtextextended('settler/outbox', 0))"
PENDING_EVENTS: Final = "SELECT tenant_id, id, topic, key, event FROM outbox ORDER BY id LIMIT $1"
DISCARD_EVENTS: Final = """
DELETE FROM outbox USING unnest($1::uuid[], $2::bigint[]) AS sent (tenant_id, id)
WHERE outbox.tenant_id = sent.tenant_id AND outbox.id = sent.id
"""

# Retention

ONE_JANITOR: Final = "SELECT pg_try_advisory_xact_lock(hashtextextended('settler/retention/' || $1, 0))"
# The oldest jobs that ended before their period, at least one, with as many result rows as one transaction may delete.
# Rows are numbered from 1 within an attempt, so the keys tell what a job's deletion costs without counting it: its last
# attempt, and the last row of each up to it, as one that was given up may have left rows. A report would not tell: no
# invalid record is in it. The attempts come as an array, which the planner takes for ten; a series it would take for a
# thousand, and have the statement compiled (JIT). The job's end is written as the index jobs_by_end has it
# (0024_rejected_jobs_end_too.sql).
DELETE_OLD_JOBS: Final = """
WITH due AS MATERIALIZED (
    SELECT job_id, CASE status WHEN 'rejected' THEN decided_at ELSE finished_at END AS ended_at FROM jobs
    WHERE tenant_id = $1
      AND CASE status WHEN 'rejected' THEN decided_at ELSE finished_at END < (SELECT kept_since('executions'))
    ORDER BY ended_at, job_id LIMIT $2
), sized AS (
    SELECT due.job_id, row_number() OVER inorder AS place,
           sum(1 + coalesce(matched.rows, 0) + coalesce(open.rows, 0)) OVER inorder AS rows
    FROM due
    CROSS JOIN LATERAL (
        SELECT sum((SELECT max(match_no) FROM matches x
                    WHERE x.tenant_id = $1 AND x.job_id = due.job_id AND x.attempt = n)) AS rows
        FROM unnest(ARRAY(SELECT generate_series(1, (SELECT max(attempt) FROM matches x
                                                     WHERE x.tenant_id = $1 AND x.job_id = due.job_id)))) AS n
    ) AS matched
    CROSS JOIN LATERAL (
        SELECT sum((SELECT max(row_no) FROM unmatched x
                    WHERE x.tenant_id = $1 AND x.job_id = due.job_id AND x.attempt = n)) AS rows
        FROM unnest(ARRAY(SELECT generate_series(1, (SELECT max(attempt) FROM unmatched x
                                                     WHERE x.tenant_id = $1 AND x.job_id = due.job_id)))) AS n
    ) AS open
    WINDOW inorder AS (ORDER BY due.ended_at, due.job_id)
), old AS MATERIALIZED (
    SELECT job_id FROM sized WHERE place = 1 OR rows <= $3
), m AS (DELETE FROM matches x USING old WHERE x.tenant_id = $1 AND x.job_id = old.job_id),
   u AS (DELETE FROM unmatched x USING old WHERE x.tenant_id = $1 AND x.job_id = old.job_id),
   r AS (DELETE FROM reports x USING old WHERE x.tenant_id = $1 AND x.job_id = old.job_id),
   e AS (DELETE FROM executions x USING old WHERE x.tenant_id = $1 AND x.job_id = old.job_id)
DELETE FROM jobs x USING old WHERE x.tenant_id = $1 AND x.job_id = old.job_id
"""
# A window is as old as its end; that its start is older still is said for the index tenant_usage_by_time.
DELETE_OLD_USAGE: Final = """
DELETE FROM tenant_usage x USING (
    SELECT resource, window_start, window_seconds FROM tenant_usage
    WHERE tenant_id = $1 AND window_start < (SELECT kept_since('usage'))
      AND window_start + make_interval(secs => window_seconds) < (SELECT kept_since('usage'))
    ORDER BY window_start LIMIT $2
) AS old
WHERE x.tenant_id = $1 AND x.resource = old.resource AND x.window_start = old.window_start
  AND x.window_seconds = old.window_seconds
"""
DELETE_OLD_SIGNALS: Final = """
DELETE FROM tenant_signals x USING (
    SELECT signal_id FROM tenant_signals
    WHERE tenant_id = $1 AND signalled_at < (SELECT kept_since('usage')) ORDER BY signalled_at LIMIT $2
) AS old
WHERE x.tenant_id = $1 AND x.signal_id = old.signal_id
"""
DELETE_OLD_AUDIT: Final = """
DELETE FROM audit_logs x USING (
    SELECT id FROM audit_logs
    WHERE tenant_id = $1 AND recorded_at < (SELECT kept_since('audit')) ORDER BY recorded_at LIMIT $2
) AS old
WHERE x.tenant_id = $1 AND x.id = old.id
"""

# Erasure

READ_ERASURE: Final = "SELECT * FROM erasures WHERE tenant_id = $1"
TENANT_TO_ERASE: Final = """
SELECT root_id, version, status, erase_after, erase_after <= now() AS due,
       (SELECT min(child_id::text) FROM tenant_children WHERE tenant_id = $1) AS child
FROM tenants WHERE id = $1
"""
BEGIN_ERASURE: Final = """
INSERT INTO erasures (tenant_id, root_id, version, asked_by) VALUES ($1, $2, $3, $4) RETURNING *
"""
ONE_ERASER: Final = "SELECT pg_advisory_xact_lock(hashtextextended('settler/erasure/' || $1, 0))"
# Where rows of the tenant may be, with the tables that each refers to.
TABLES_TO_ERASE: Final = """
SELECT n.nspname AS schema, c.relname AS name, ARRAY(
           SELECT r.relname::text FROM pg_constraint k JOIN pg_class r ON r.oid = k.confrelid
           WHERE k.conrelid = c.oid AND k.contype = 'f' AND r.relnamespace = n.oid AND r.oid <> c.oid) AS refers_to
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped
WHERE n.nspname IN ('public', (SELECT schema_name FROM tenant_schemas WHERE tenant_id = $1)) AND c.relkind IN ('r', 'p')
  AND c.relname NOT IN ('tenant_schemas', 'tenant_slugs', 'erasures')
ORDER BY 1, 2
"""
ERASE_ROWS: Final = """
DELETE FROM %1$I.%2$I WHERE ctid = ANY (ARRAY(SELECT ctid FROM %1$I.%2$I WHERE tenant_id = %3$L LIMIT %4$s))
"""
COUNT_TENANT_ROWS: Final = "SELECT count(*) FROM %1$I.%2$I WHERE tenant_id = %3$L"
COUNT_ERASED: Final = """
UPDATE erasures SET counts = jsonb_set(counts, ARRAY[$2], to_jsonb(coalesce((counts ->> $2)::bigint, 0) + $3::bigint))
WHERE tenant_id = $1
"""
NOTE_COUNTS: Final = "UPDATE erasures SET counts = $2::text::jsonb || counts WHERE tenant_id = $1"
FORGET_TENANT: Final = "SELECT forget_tenant()"
STEP_DONE: Final = "UPDATE erasures SET steps = array_append(array_remove(steps, $2), $2) WHERE tenant_id = $1"
STEP_UNDONE: Final = "UPDATE erasures SET steps = array_remove(steps, $2) WHERE tenant_id = $1"
END_ERASURE: Final = "UPDATE erasures SET ended_at = now() WHERE tenant_id = $1"

# Schemas of tenants

LIMIT_LOCK_WAIT_TO: Final = "SET LOCAL lock_timeout = %L"
SET_LOCK_WAIT_TO: Final = "SET lock_timeout = %L"
# False while one is under way. As create_tenant_schema() does.
KEEP_MIGRATIONS_OUT: Final = "SELECT pg_try_advisory_xact_lock_shared(hashtextextended('settler/migrate', 0))"
TENANT_EXISTS: Final = "SELECT EXISTS (SELECT FROM public.tenants WHERE id = $1)"
CREATE_TENANT_SCHEMA: Final = "SELECT public.create_tenant_schema()"
LOCK_TENANT_SCHEMA: Final = "SELECT pg_advisory_xact_lock(public.tenant_lock($1))"
SHARE_TENANT_SCHEMA: Final = "SELECT pg_advisory_lock_shared(public.tenant_lock($1))"
SCHEMA_OF: Final = "SELECT schema_name FROM public.tenant_schemas WHERE tenant_id = $1"
SCHEMAS_AFTER: Final = """
SELECT nspname FROM pg_namespace WHERE nspname ~ '^t_[0-9a-f]{32}$' AND nspname > $1 ORDER BY nspname LIMIT $2
"""
SCHEMAS_COUNT: Final = "SELECT count(*) FROM pg_namespace WHERE nspname ~ '^t_[0-9a-f]{32}$'"
LAYOUT_OF: Final = "SELECT layout FROM public.tenant_schemas WHERE tenant_id = $1 FOR UPDATE"
RECORD_LAYOUT: Final = "UPDATE public.tenant_schemas SET layout = $2 WHERE tenant_id = $1"
FORGET_SCHEMA: Final = "DELETE FROM public.tenant_schemas WHERE tenant_id = $1"
DROP_SCHEMA: Final = "DROP SCHEMA %I CASCADE"
MOVE_TENANT_ROWS: Final = "SELECT public.move_tenant_rows($1, $2)"
LAYOUT_DIFFERENCES: Final = """
SELECT 'missing: ' || statement FROM (
    SELECT public.tenant_layout('public') EXCEPT SELECT public.tenant_layout($1)) AS missing (statement)
UNION ALL
SELECT 'of its own: ' || statement FROM (
    SELECT public.tenant_layout($1) EXCEPT SELECT public.tenant_layout('public')) AS own (statement)
ORDER BY 1
"""
# What a layout does not say: owners, grants on the schema, grant options, a view's columns' grants, rules, and whatever
# stands in the schema beside the tables and views.
SCHEMA_ADDITIONS: Final = """
WITH own AS (SELECT oid, nspowner, nspacl FROM pg_namespace WHERE nspname = $1),
owner AS (SELECT relowner AS oid FROM pg_class WHERE oid = 'public.tenant_schemas'::regclass),
relations AS (
    SELECT c.oid, c.relname, c.relkind, c.relowner, c.relacl FROM pg_class c
    WHERE c.oid IN (SELECT public.tenant_tables($1)) OR c.relnamespace = (SELECT oid FROM own) AND c.relkind = 'v'
), held (what, holder, acl, said) AS (
    SELECT 'SCHEMA', nspowner, nspacl, false FROM own UNION ALL SELECT relname, relowner, relacl, true FROM relations
    UNION ALL
    SELECT r.relname || '.' || a.attname, r.relowner, a.attacl, r.relkind <> 'v'
    FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attacl IS NOT NULL
)
SELECT 'of its own: ' || pg_describe_object(d.classid, d.objid, d.objsubid) FROM pg_depend d
WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = (SELECT oid FROM own)
  AND NOT (d.classid = 'pg_class'::regclass AND d.objid IN (SELECT oid FROM relations))
  AND NOT EXISTS (SELECT FROM pg_depend part WHERE part.classid = d.classid AND part.objid = d.objid
                  AND part.deptype = 'i')
UNION ALL
SELECT 'of its own: ' || pg_describe_object('pg_rewrite'::regclass, w.oid, 0)
FROM pg_rewrite w JOIN relations r ON r.oid = w.ev_class WHERE w.rulename <> '_RETURN'
UNION ALL
SELECT format('of its own: %s OWNER TO %s', what, holder::regrole) FROM held WHERE holder <> (SELECT oid FROM owner)
UNION ALL
SELECT format('of its own: GRANT %s ON %s TO %s%s', a.privilege_type, what,
              CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
              CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM held CROSS JOIN aclexplode(acl) AS a
WHERE a.grantee <> holder AND (a.is_grantable OR NOT said) AND NOT (
    what = 'SCHEMA' AND NOT a.is_grantable AND a.privilege_type = 'USAGE'
    AND a.grantee::regrole::text IN ('settler_services', 'settler_janitor', 'settler_eraser'))
ORDER BY 1
"""

# Export

LAST_MIGRATION: Final = "SELECT max(version) FROM public.schema_migrations"
ROOT_OF: Final = "SELECT root_id FROM public.tenants WHERE id = $1"
TABLES_OF_TENANTS: Final = """
SELECT relname FROM pg_class WHERE oid IN (SELECT public.tenant_tables('public'))
UNION ALL VALUES ('tenants'), ('feature_flags') ORDER BY 1
"""
ROWS_AS_JSON: Final = "SELECT to_jsonb(t) - $1::text[] FROM "

# Restoring a backup

SERIALISE_RESTORE: Final = "SELECT pg_advisory_lock(hashtextextended('settler/restore/' || $1, 0))"
# Every table of the shared schema that says whose its rows are, those of no tenant's schema included.
TABLES_WITH_TENANTS: Final = """
SELECT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND a.attname = 'tenant_id'
  AND NOT a.attisdropped
UNION ALL VALUES ('tenants') ORDER BY 1
"""
HOLDS_ROW: Final = "SELECT EXISTS (SELECT FROM public.%I WHERE %I = %L)"
SCHEMA_IS_THERE: Final = "SELECT to_regnamespace('t_' || replace($1, '-', '')) IS NOT NULL"
REFERENCES: Final = """
SELECT DISTINCT c.relname, r.relname FROM pg_constraint k
JOIN pg_class c ON c.oid = k.conrelid JOIN pg_class r ON r.oid = k.confrelid
WHERE k.contype = 'f' AND k.connamespace = 'public'::regnamespace AND k.conrelid <> k.confrelid
"""
LINES_TABLE: Final = "restored_lines"
CREATE_LINES: Final = f"CREATE TEMPORARY TABLE {LINES_TABLE} (line jsonb NOT NULL) ON COMMIT DROP"
EMPTY_LINES: Final = f"TRUNCATE pg_temp.{LINES_TABLE}"
# The condition: an owner that is a superuser would write rows of any tenant.
INSERT_LINES: Final = (
    "INSERT INTO %I ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM pg_temp.restored_lines "
    "CROSS JOIN jsonb_populate_record(NULL::%I, line) AS t WHERE t.%I = %L"
)
RESTORE_LANES: Final = """
INSERT INTO webhook_lanes (tenant_id, webhook_id) SELECT tenant_id, id FROM webhooks WHERE tenant_id = $1
"""
RESTORE_CHILD: Final = """
INSERT INTO tenant_children (tenant_id, child_id, created_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
"""
CREATED_AT: Final = "SELECT created_at FROM tenants WHERE id = $1"
# A child that is gone cannot be listed. The registry is what the owner sees of all tenants.
FORGET_MISSING_CHILDREN: Final = """
DELETE FROM tenant_children WHERE tenant_id = $1 AND child_id NOT IN (SELECT tenant_id FROM public.tenant_slugs)
"""
AUDITED: Final = "SELECT EXISTS (SELECT FROM audit_logs WHERE tenant_id = $1 AND action = $2 AND subject = $3)"

# Migration

SERVER_VERSION: Final = "SELECT current_setting('server_version_num')::integer"
SERIALISE_MIGRATION: Final = "SELECT pg_advisory_lock(hashtextextended('settler/migrate', 0))"
LIMIT_LOCK_WAIT: Final = "SET lock_timeout = '10s'"
DATABASE_EXISTS: Final = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
ROLE_EXISTS: Final = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)"
# Statements that take no parameters are put together by format(), which quotes identifiers (%I) and literals (%L).
FORMAT: Final = "SELECT format($1, VARIADIC $2::text[])"
CREATE_DATABASE: Final = "CREATE DATABASE %I ENCODING 'UTF8' TEMPLATE template0"
# A managed server lets no one but its own superuser name these attributes, so they are named only when present.
ROLE_IS_CONFINED: Final = """
SELECT NOT (rolsuper OR rolbypassrls OR rolcreatedb OR rolcreaterole OR rolreplication) FROM pg_roles WHERE rolname = $1
"""
CONFINE_ROLE: Final = "ALTER ROLE %I NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE NOREPLICATION"
CREATE_GROUP: Final = "CREATE ROLE %I NOLOGIN"
CREATE_LOGIN: Final = "CREATE ROLE %I LOGIN"
ALLOW_LOGIN: Final = "ALTER ROLE %I LOGIN PASSWORD %L"
LIMIT_LOGIN: Final = "ALTER ROLE %I SET %I = %L"
JOIN_SERVICES: Final = "GRANT settler_services TO %I WITH INHERIT TRUE, SET FALSE, ADMIN FALSE"
JOIN_RELAY: Final = "GRANT settler_relay TO %I WITH INHERIT FALSE, SET TRUE, ADMIN FALSE"
JOIN_COURIER: Final = "GRANT settler_courier TO %I WITH INHERIT FALSE, SET TRUE, ADMIN FALSE"
JOIN_JANITOR: Final = "GRANT settler_janitor TO %I WITH INHERIT FALSE, SET TRUE, ADMIN FALSE"
JOIN_ERASER: Final = "GRANT settler_eraser TO %I WITH INHERIT FALSE, SET TRUE, ADMIN FALSE"
CLOSE_DATABASE: Final = "REVOKE ALL ON DATABASE %I FROM PUBLIC"
OPEN_DATABASE: Final = "GRANT CONNECT ON DATABASE %I TO settler_services"
CLOSE_SCHEMA: Final = "REVOKE ALL ON SCHEMA %I FROM PUBLIC"
OPEN_SCHEMA: Final = """
GRANT USAGE ON SCHEMA %I TO settler_services, settler_relay, settler_courier, settler_janitor, settler_eraser
"""
SEARCH_PATH: Final = "SELECT set_config('search_path', quote_ident($1) || ', pg_temp', true)"
CREATE_LEDGER: Final = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
READ_LEDGER: Final = "SELECT version, name, checksum FROM schema_migrations ORDER BY version"
RECORD_MIGRATION: Final = "INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)"
FORGET_MIGRATION: Final = "DELETE FROM schema_migrations WHERE version = $1"
SCHEMAS_UNKNOWN: Final = f"{SCHEMAS_COUNT} AND to_regclass('public.tenant_schemas') IS NULL"
STORED_COLUMNS: Final = """
SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relnamespace = to_regnamespace(quote_ident($1)) AND c.relkind IN ('r', 'p')
  AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
"""
LOCK_TABLE: Final = "LOCK TABLE %I.%I IN ACCESS EXCLUSIVE MODE"
UNFORCE_TABLE: Final = "ALTER TABLE %I.%I NO FORCE ROW LEVEL SECURITY"
ROW_SECURITY_OFF: Final = "SET LOCAL row_security = off"
COUNT_ROWS: Final = "SELECT count(*) FROM %I.%I"
WHERE_ANY_OF: Final = " WHERE num_nonnulls({}) > 0"
