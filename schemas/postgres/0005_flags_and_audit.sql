-- Feature flags, and the record of who changed what.

-- Nothing in the key is NULL, since a NULL would escape it: a platform-wide flag carries the nil UUID as its tenant,
-- and a flag that is not about one user the empty string as its user. A user here is whatever key the caller evaluates
-- flags for, which need not be a row of `users`.
CREATE TABLE feature_flags (
    tenant_id      uuid NOT NULL,
    flag           text NOT NULL,
    scope          text NOT NULL CHECK (scope IN ('user', 'tenant', 'global')),
    user_id        text NOT NULL DEFAULT '',
    enabled        boolean NOT NULL,
    killed         boolean NOT NULL DEFAULT false,
    -- Rules, percentages and salt, as the flags agent accepted them.
    definition     jsonb NOT NULL DEFAULT '{}',
    -- A removed flag stays as a row, so that an older change cannot bring it back.
    removed        boolean NOT NULL DEFAULT false,
    changed_by     text NOT NULL,
    changed_at     timestamptz NOT NULL,
    source_version bigint NOT NULL CHECK (source_version >= 0),
    PRIMARY KEY (tenant_id, flag, scope, user_id),
    CHECK ((scope = 'global') = (tenant_id = '00000000-0000-0000-0000-000000000000')),
    CHECK ((scope = 'user') = (user_id <> ''))
);
-- The one table in which every tenant may read the platform's rows; it may write only its own. Hence its own policies:
-- reading is wider by the nil UUID, once there is a context; INSERT, UPDATE and DELETE are as everywhere.
ALTER TABLE feature_flags ENABLE ROW LEVEL SECURITY;
ALTER TABLE feature_flags FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant_rows ON feature_flags
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid))
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
CREATE POLICY platform_rows ON feature_flags FOR SELECT
    USING (tenant_id = '00000000-0000-0000-0000-000000000000'
           AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) IS NOT NULL);
CREATE POLICY tenant_rows_only ON feature_flags AS RESTRICTIVE FOR SELECT
    USING (tenant_id IN ((SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid),
                         '00000000-0000-0000-0000-000000000000')
           AND (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid) IS NOT NULL);
CREATE POLICY tenant_rows_only_insert ON feature_flags AS RESTRICTIVE FOR INSERT
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
CREATE POLICY tenant_rows_only_update ON feature_flags AS RESTRICTIVE FOR UPDATE
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid))
    WITH CHECK (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
CREATE POLICY tenant_rows_only_delete ON feature_flags AS RESTRICTIVE FOR DELETE
    USING (tenant_id = (SELECT NULLIF(current_setting('app.tenant_id', true), '')::uuid));
GRANT SELECT, INSERT, UPDATE ON feature_flags TO settler_services;

-- Append-only for the services: no UPDATE, no DELETE. `id` is the id of the event or request that is recorded, so a
-- repeated write finds it there.
CREATE TABLE audit_logs (
    tenant_id   uuid NOT NULL,
    id          uuid NOT NULL,
    actor       text NOT NULL,
    action      text NOT NULL,
    subject     text NOT NULL,
    before      jsonb,
    after       jsonb,
    request_id  text,
    recorded_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, id)
);
CREATE INDEX audit_logs_by_time ON audit_logs (tenant_id, recorded_at);
CALL protect_tenant_table('audit_logs');
GRANT SELECT, INSERT ON audit_logs TO settler_services;
