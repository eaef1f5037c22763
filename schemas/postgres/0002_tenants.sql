-- Tenants and what their administrators manage. Written by the services, in the tenant's own context.

CREATE TABLE tenants (
    id         uuid PRIMARY KEY,
    parent_id  uuid,
    root_id    uuid NOT NULL,
    slug       text NOT NULL CHECK (slug ~ '^[a-z0-9](-?[a-z0-9])*$' AND length(slug) <= 63),
    name       text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    tier       text NOT NULL CHECK (tier IN ('free', 'starter', 'growth', 'scale', 'enterprise')),
    status     text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'deleted')),
    config     jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(config) = 'object'),
    -- Overrides of the tier's limits, quota type to limit; a type that is absent has the tier's limit.
    quotas     jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(quotas) = 'object'),
    -- Grows by one with every change; the folds that read the tenant's changes apply only a greater one.
    version    bigint NOT NULL DEFAULT 1 CHECK (version >= 1),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    -- The nil UUID is the platform, never a tenant.
    CHECK (id <> '00000000-0000-0000-0000-000000000000'),
    -- A tenant without a parent is its own root; a child's root is its parent's root.
    CHECK ((parent_id IS NULL) = (root_id = id)),
    UNIQUE (id, root_id),
    FOREIGN KEY (parent_id, root_id) REFERENCES tenants (id, root_id)
);
CALL protect_tenant_table('tenants', 'id');
-- Identity and place in the hierarchy never change: events are partitioned by the root tenant.
GRANT SELECT, INSERT ON tenants TO settler_services;
GRANT UPDATE (name, tier, status, config, quotas, version, updated_at) ON tenants TO settler_services;

-- Which slugs are taken. Slugs are unique across tenants, and a unique index answers whether a value exists, even to
-- those who may not read it. So the registry is a table of its own, closed to the services: all that can be learnt is
-- that creating a tenant with a taken slug fails. That is accepted: slugs are public names (they stand in addresses),
-- and only a caller who may create tenants can ask. No other unique key reaches across tenants.
CREATE TABLE tenant_slugs (
    slug      text PRIMARY KEY,
    tenant_id uuid NOT NULL UNIQUE REFERENCES tenants (id)
);
-- Enabled without a policy: nobody but the owner, who is not forced, sees or writes a row.
ALTER TABLE tenant_slugs ENABLE ROW LEVEL SECURITY;

-- SECURITY DEFINER, reviewed: the services cannot write the registry, so that no tenant can occupy a slug for another
-- one. The function takes no argument, returns nothing, runs only as the trigger below, and copies two columns of a
-- row that has passed the policies of `tenants`.
CREATE FUNCTION register_slug() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    INSERT INTO tenant_slugs (slug, tenant_id) VALUES (NEW.slug, NEW.id);
    RETURN NULL;
END
$$;
CREATE TRIGGER register_slug AFTER INSERT ON tenants FOR EACH ROW EXECUTE FUNCTION register_slug();

CREATE TABLE users (
    tenant_id     uuid NOT NULL REFERENCES tenants (id),
    id            uuid NOT NULL,
    email         text NOT NULL CHECK (email = lower(email) AND position('@' IN email) > 1),
    password_hash text NOT NULL,
    role          text NOT NULL CHECK (role IN ('owner', 'admin', 'member', 'viewer')),
    status        text NOT NULL DEFAULT 'active' CHECK (status IN ('invited', 'active', 'disabled')),
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, email)
);
CALL protect_tenant_table('users');
GRANT SELECT, INSERT, UPDATE, DELETE ON users TO settler_services;

-- A key reads sk_<tenant>_<secret>: it names its tenant, so the context exists before the look-up. Only the hash is here.
CREATE TABLE api_keys (
    tenant_id    uuid NOT NULL REFERENCES tenants (id),
    id           uuid NOT NULL,
    key_hash     bytea NOT NULL CHECK (length(key_hash) = 32),
    name         text NOT NULL,
    scopes       text[] NOT NULL DEFAULT '{}',
    created_by   uuid,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, key_hash),
    FOREIGN KEY (tenant_id, created_by) REFERENCES users (tenant_id, id) ON DELETE SET NULL (created_by)
);
CALL protect_tenant_table('api_keys');
GRANT SELECT, INSERT ON api_keys TO settler_services;
GRANT UPDATE (name, scopes, expires_at, revoked_at) ON api_keys TO settler_services;

CREATE TABLE domains (
    tenant_id          uuid NOT NULL REFERENCES tenants (id),
    id                 uuid NOT NULL,
    domain             text NOT NULL CHECK (domain = lower(domain) AND length(domain) BETWEEN 3 AND 253),
    status             text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'verified')),
    verification_token text NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT now(),
    verified_at        timestamptz,
    PRIMARY KEY (tenant_id, id),
    -- Per tenant only: whether another tenant has claimed the same domain is nobody's business.
    UNIQUE (tenant_id, domain),
    CHECK ((status = 'verified') = (verified_at IS NOT NULL))
);
CALL protect_tenant_table('domains');
GRANT SELECT, INSERT, UPDATE, DELETE ON domains TO settler_services;

CREATE TABLE webhooks (
    tenant_id        uuid NOT NULL REFERENCES tenants (id),
    id               uuid NOT NULL,
    url              text NOT NULL,
    secret_encrypted bytea NOT NULL,
    event_types      text[] NOT NULL DEFAULT '{}',
    status           text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'paused')),
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);
CALL protect_tenant_table('webhooks');
GRANT SELECT, INSERT, UPDATE, DELETE ON webhooks TO settler_services;
