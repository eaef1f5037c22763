-- scope: tenant
-- The rest of a tenant's life: its children, its deletion, and users who are invited.
--
-- Run in the shared schema, then in each tenant's own. What all tenants share changes in the first of these runs.

-- Who lies directly under a tenant. The row is the parent's: policies never widen, so a parent learns of its children
-- from its own rows, and each child is read in the child's context. Rows stay as long as their child does.
CREATE TABLE tenant_children (
    tenant_id  uuid NOT NULL REFERENCES tenants (id),
    child_id   uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, child_id),
    CONSTRAINT nobody_is_a_child_of_itself CHECK (child_id <> tenant_id)
);
CALL protect_tenant_table('tenant_children');
GRANT SELECT, INSERT ON tenant_children TO settler_services;

-- Who is invited has no password yet; the token in the invitation is stored hashed, as an API key is.
ALTER TABLE users
    ALTER COLUMN password_hash DROP NOT NULL,
    ADD COLUMN invitation_hash bytea,
    ADD COLUMN invitation_expires_at timestamptz,
    ADD CONSTRAINT only_the_invited_have_no_password CHECK (status = 'invited' OR password_hash IS NOT NULL),
    ADD CONSTRAINT only_the_invited_have_an_invitation CHECK (
        (invitation_hash IS NULL) = (invitation_expires_at IS NULL) AND (status = 'invited' OR invitation_hash IS NULL)),
    ADD CONSTRAINT an_invitation_is_a_sha256 CHECK (length(invitation_hash) = 32);

DO $$
DECLARE
    context text := current_setting('app.tenant_id', true);
    child uuid;
    parent uuid;
BEGIN
    IF current_schema() <> 'public' THEN
        INSERT INTO tenant_children SELECT * FROM public.tenant_children WHERE tenant_id = context::uuid;
        DELETE FROM public.tenant_children WHERE tenant_id = context::uuid;
        RETURN;
    END IF;
    -- Set while the tenant is deleted: from when on it may be erased, and what `restore` makes of it until then.
    ALTER TABLE tenants
        ADD COLUMN erase_after timestamptz,
        ADD COLUMN restored_as text,
        ADD CONSTRAINT only_the_deleted_are_erased CHECK (
            (erase_after IS NULL) = (restored_as IS NULL) AND (status = 'deleted' OR erase_after IS NULL)),
        ADD CONSTRAINT what_is_restored CHECK (restored_as IN ('active', 'suspended'));
    GRANT UPDATE (erase_after, restored_as) ON tenants TO settler_services;
    -- The registry is the one list of all tenants that the owner can read; everything else is read in their contexts.
    FOR child IN SELECT tenant_id FROM tenant_slugs LOOP
        PERFORM set_config('app.tenant_id', child::text, true);
        SELECT parent_id INTO parent FROM tenants WHERE id = child;
        IF parent IS NOT NULL THEN
            PERFORM set_config('app.tenant_id', parent::text, true);
            INSERT INTO tenant_children (tenant_id, child_id) VALUES (parent, child);
        END IF;
    END LOOP;
    PERFORM set_config('app.tenant_id', coalesce(context, ''), true);
END
$$;
