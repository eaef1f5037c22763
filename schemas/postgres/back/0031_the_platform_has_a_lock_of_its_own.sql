-- Undoes 0031: the function as 0014 has it.
CREATE OR REPLACE FUNCTION tenant_lock(tenant uuid) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN hashtextextended('settler/tenant-schema', 0) + (hashtextextended(tenant::text, 0) & 1023);
