-- The platform's transactions (projections, the outbox, lanes of webhooks) take a lock that no tenant has. They had that of
-- one tenant in 1,024, and nobody wrote anything while such a tenant was moved, or began to be erased.
--
-- Nobody keeps the platform out on purpose: a transaction that began before, with the number it had, may go on.
CREATE OR REPLACE FUNCTION tenant_lock(tenant uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN hashtextextended('settler/tenant-schema', 0)
       + CASE tenant WHEN '00000000-0000-0000-0000-000000000000' THEN 1024
                     ELSE hashtextextended(tenant::text, 0) & 1023 END;
