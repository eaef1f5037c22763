-- Stores what was read from the database under a lease, unless the lease has ended or a newer version is known.
--
-- KEYS: the tenant's hash, see tenant_read.lua. ARGV: version, the format's field, the value, the lease, how long the
-- value lives (ms). Versions are decimal numbers without leading zeros; as text they compare exactly whatever their size.
--
-- Returns: 'stored', 'lease' (it has ended) or 'stale' (a newer version is known).
local key, version = KEYS[1], ARGV[1]
if redis.call('TYPE', key).ok ~= 'hash' then return 'lease' end
local held = redis.call('HMGET', key, 'l', 'v', 'u')
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if held[1] ~= ARGV[4] or (tonumber(held[3] or '0') or 0) <= now then return 'lease' end
local known = held[2] and string.match(held[2], '^[1-9]%d*$')
if known and (#known > #version or (#known == #version and known > version)) then return 'stale' end
-- The same version in another format stays: during an upgrade both are read.
if known == version then redis.call('HDEL', key, 'l', 'u') else redis.call('DEL', key) end
redis.call('HSET', key, 'v', version, ARGV[2], ARGV[3])
redis.call('PEXPIRE', key, ARGV[5])
return 'stored'
