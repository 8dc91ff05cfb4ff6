-- Take expired holds out of one scope, and out of its requests in flight.
--
-- KEYS  1 spend (hash)   2 holds (zset of <job id>:<nano-USD>)   3 in flight (zset of job ids)
-- ARGV  1 now (epoch ms)
-- Returns the number of holds that were taken out.
-- Example: EVAL ... aiscale:spend:key:k aiscale:holds:key:k aiscale:inflight:key:k  1700000000000  -> 1
-- Atomic: what is held and the sum of it change in one step. The gate does the same for the scopes that it looks at; this is for those
-- that nobody asks for any more.
local expired, freed = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1]), 0
for _, hold in ipairs(expired) do freed = freed + tonumber(string.match(hold, ':(%d+)$')) end
local held = redis.call('HGET', KEYS[1], 'held_nanousd')
if held and freed > 0 then
  redis.call('HSET', KEYS[1], 'held_nanousd', string.format('%.0f', math.max(tonumber(held) - freed, 0)))
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[1])
return #expired
