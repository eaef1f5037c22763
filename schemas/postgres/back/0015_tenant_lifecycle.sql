-- scope: tenant
-- Undoes 0015. Run in each tenant's own schema, then in the shared one.

DO $$
BEGIN
    IF current_schema() = 'public' THEN
        ALTER TABLE tenants
            DROP CONSTRAINT only_the_deleted_are_erased,
            DROP CONSTRAINT what_is_restored,
            DROP COLUMN erase_after,
            DROP COLUMN restored_as;
    ELSE
        -- The migration takes them from there, should it run again before the shared schema has gone back.
        INSERT INTO public.tenant_children SELECT * FROM tenant_children;
    END IF;
END
$$;
DROP TABLE tenant_children;

-- Who is invited stays so, and needs another invitation; as in shadow(5), no password matches '!'. The owner, who may
-- be no superuser, has to see all rows.
ALTER TABLE users NO FORCE ROW LEVEL SECURITY;
UPDATE users SET password_hash = '!' WHERE password_hash IS NULL;
ALTER TABLE users
    FORCE ROW LEVEL SECURITY,
    DROP CONSTRAINT only_the_invited_have_no_password,
    DROP CONSTRAINT only_the_invited_have_an_invitation,
    DROP CONSTRAINT an_invitation_is_a_sha256,
    DROP COLUMN invitation_hash,
    DROP COLUMN invitation_expires_at,
    ALTER COLUMN password_hash SET NOT NULL;
