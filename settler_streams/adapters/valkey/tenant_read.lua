-- Reads one tenant's cached configuration; who finds none gets a lease, without which nothing can be stored.
--
-- KEYS: the tenant's hash. It holds v (version), one field per format with the value of that version, and, while
-- somebody reads the database for it, l (lease) and u (until when, in ms of the server's clock).
-- ARGV: the format's field, a new lease, how long a lease lasts (ms), how long a key without an end may go on (ms).
--
-- All who miss at a time share the first one's lease. It ends when something is stored, by an invalidation, a flush and
-- by its age: what was read from the database before any of these cannot be stored after it.
--
-- Returns: the version or nil; the value or nil; the lease, nil with a value; 1 when the key was of another type.
local key, foreign = KEYS[1], 0
local kind = redis.call('TYPE', key).ok
if kind ~= 'hash' and kind ~= 'none' then
  redis.call('DEL', key)
  foreign = 1
end
local found = redis.call('HMGET', key, 'v', ARGV[1], 'l', 'u')
if redis.call('PTTL', key) == -1 then redis.call('PEXPIRE', key, ARGV[4]) end
if found[1] and found[2] then return {found[1], found[2], false, foreign} end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if not found[3] or (tonumber(found[4] or '0') or 0) <= now then
  found[3] = ARGV[2]
  redis.call('HSET', key, 'l', ARGV[2], 'u', string.format('%.0f', now + ARGV[3]))
  if redis.call('PTTL', key) < tonumber(ARGV[3]) then redis.call('PEXPIRE', key, ARGV[3]) end
end
return {found[1], false, found[3], foreign}
