-- Charges one request to every limit of a chain, or to none. Times are the server's own.
--
-- KEYS: one hash per limit, all in one slot. ARGV: cost in tokens, then per limit: rate per minute, burst.
-- A hash holds l (level), t (as of when, ms), r (rate) and b (burst) under which it was written. The unit of a level is
-- 1/60000 token, so every whole rate per minute refills a whole number of units in each millisecond; a level is at most
-- 10^10 * 60000 < 2^53, so doubles hold every number here exactly. What flowed in since is computed, never stored.
-- A limit without a hash is a full one: a hash expires when its bucket would be full again.
--
-- Returns: 1 or 0; the place of the limit that holds the request back longest, or -1; then per limit its whole tokens,
-- and the milliseconds until the request would pass (0 when it would; -1: never).
local UNIT = 60000
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local cost = tonumber(ARGV[1]) * UNIT
local levels, times, answer = {}, {}, {1, -1}
local longest = -1
for i, key in ipairs(KEYS) do
  local rate, capacity = tonumber(ARGV[2 * i]), ARGV[2 * i + 1] * UNIT
  local stored = redis.call('HMGET', key, 'l', 't', 'r', 'b')
  local level, at = capacity, now
  if stored[1] then
    local old_rate, old_capacity = tonumber(stored[3]), stored[4] * UNIT
    level, at = tonumber(stored[1]), math.max(now, tonumber(stored[2]))
    local elapsed = at - tonumber(stored[2])
    -- The rate that ruled until now pays for the past. Dividing first keeps the product within 2^53.
    if old_rate > 0 and elapsed >= (old_capacity - level) / old_rate then
      level = old_capacity
    else
      level = level + elapsed * old_rate
    end
    level = math.min(level, capacity)
  end
  levels[i], times[i] = level, at
  local wait = 0
  if level < cost then
    if rate == 0 or cost > capacity then wait = -1 else wait = math.ceil((cost - level) / rate) + at - now end
    answer[1] = 0
    if wait == -1 then longest, answer[2] = math.huge, i - 1
    elseif wait > longest then longest, answer[2] = wait, i - 1 end
  end
  answer[2 * i + 1], answer[2 * i + 2] = math.floor(level / UNIT), wait
end
if answer[1] == 0 then return answer end
for i, key in ipairs(KEYS) do
  local rate, capacity, left = tonumber(ARGV[2 * i]), ARGV[2 * i + 1] * UNIT, levels[i] - cost
  redis.call('HSET', key, 'l', string.format('%.0f', left), 't', string.format('%.0f', times[i]),
             'r', ARGV[2 * i], 'b', ARGV[2 * i + 1])
  if rate > 0 then
    redis.call('PEXPIRE', key, string.format('%.0f', math.ceil((capacity - left) / rate) + times[i] - now + 1))
  else
    redis.call('PERSIST', key)
  end
  answer[2 * i + 1] = math.floor(left / UNIT)
end
return answer
