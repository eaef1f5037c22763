-- Drops what is older than a version, in every format, and leaves the version behind, so that nothing older is stored.
--
-- KEYS: the tenant's hash, see tenant_read.lua. ARGV: version, how long the mark lives (ms).
-- Returns: 1 when something older, or nothing, was there; 0 when that version or a newer one was known already.
local key, version = KEYS[1], ARGV[1]
local kind = redis.call('TYPE', key).ok
local known = kind == 'hash' and redis.call('HGET', key, 'v')
known = known and string.match(known, '^[1-9]%d*$')
if known and (#known > #version or (#known == #version and known >= version)) then return 0 end
redis.call('DEL', key)
redis.call('HSET', key, 'v', version)
redis.call('PEXPIRE', key, ARGV[2])
return 1
