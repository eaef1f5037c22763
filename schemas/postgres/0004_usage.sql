-- What a tenant uses and what was signalled about it. Projected from topics: the newest source version of a row
-- wins and nothing is ever incremented, so writing a batch twice changes nothing.

CREATE TABLE tenant_usage (
    tenant_id      uuid NOT NULL,
    resource       text NOT NULL,
    window_start   timestamptz NOT NULL,
    window_seconds integer NOT NULL CHECK (window_seconds > 0),
    quantity       bigint NOT NULL,
    source_version bigint NOT NULL CHECK (source_version >= 0),
    PRIMARY KEY (tenant_id, resource, window_start, window_seconds)
);
CALL protect_tenant_table('tenant_usage');
GRANT SELECT, INSERT, UPDATE ON tenant_usage TO settler_services;

CREATE TABLE tenant_quota_usage (
    tenant_id      uuid NOT NULL,
    quota_type     text NOT NULL,
    used           bigint NOT NULL CHECK (used >= 0),
    reserved       bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    -- NULL: no limit.
    limit_value    bigint CHECK (limit_value >= 0),
    -- NULL: the quota does not renew.
    window_end     timestamptz,
    source_version bigint NOT NULL CHECK (source_version >= 0),
    PRIMARY KEY (tenant_id, quota_type)
);
CALL protect_tenant_table('tenant_quota_usage');
GRANT SELECT, INSERT, UPDATE ON tenant_quota_usage TO settler_services;

-- Verdicts of the noisy-neighbour detector and quota thresholds, as the tenant may see them: `detail` names no other
-- tenant.
CREATE TABLE tenant_signals (
    tenant_id      uuid NOT NULL,
    signal_id      uuid NOT NULL,
    kind           text NOT NULL CHECK (kind IN ('noisy', 'quiet', 'quota-threshold')),
    resource       text NOT NULL,
    detail         jsonb NOT NULL DEFAULT '{}',
    signalled_at   timestamptz NOT NULL,
    source_version bigint NOT NULL CHECK (source_version >= 0),
    PRIMARY KEY (tenant_id, signal_id)
);
CREATE INDEX tenant_signals_by_time ON tenant_signals (tenant_id, signalled_at);
CALL protect_tenant_table('tenant_signals');
GRANT SELECT, INSERT, UPDATE ON tenant_signals TO settler_services;
