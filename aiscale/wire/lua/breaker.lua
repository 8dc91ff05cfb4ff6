-- Decide whether an upstream may be asked, and learn from how it answered. All processes share one breaker for each upstream.
--
-- KEYS  1 breaker (hash)
-- ARGV  1 'ask', 'good' or 'bad'   2 now (epoch ms)   3 failures in a row that open it   4 how long it stays open (ms)
--       5 how long one probe may take (ms)
-- Returns 'ask': {1, 0} when it may be asked, {0, ms} when it may not before so many milliseconds. 'good', 'bad': {1, 0}.
-- Example: EVAL ... aiscale:breaker:acme  ask 1700000000000 5 10000 30000  -> {1, 0}
-- Atomic: of all that come when it is half open, one may probe.
local now = tonumber(ARGV[2])
local state = redis.call('HMGET', KEYS[1], 'failures', 'open_until_ms', 'probe_until_ms')
local failures, open_until, probe_until = tonumber(state[1] or 0), tonumber(state[2] or 0), tonumber(state[3] or 0)
if ARGV[1] == 'good' then
  redis.call('DEL', KEYS[1])
  return {1, 0}
end
if ARGV[1] == 'bad' then
  failures = failures + 1
  redis.call('HSET', KEYS[1], 'failures', failures, 'probe_until_ms', 0)
  if failures >= tonumber(ARGV[3]) then redis.call('HSET', KEYS[1], 'open_until_ms', now + tonumber(ARGV[4])) end
  redis.call('PEXPIRE', KEYS[1], 3600000)
  return {1, 0}
end
if failures < tonumber(ARGV[3]) then return {1, 0} end
if now < open_until then return {0, open_until - now} end
if now < probe_until then return {0, probe_until - now} end
redis.call('HSET', KEYS[1], 'probe_until_ms', now + tonumber(ARGV[5]))
return {1, 0}
