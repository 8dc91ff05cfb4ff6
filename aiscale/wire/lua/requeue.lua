-- Take a job back from a worker that died before its first token, let it rest, and put it back at its place. Uses queue.lua.
--
-- KEYS  1 job record (hash)   2 leases (zset)   3 queue state (hash)   4 queued jobs of the model (zset)   5 Celery's queue (list)
-- ARGV  1 job id   2 now (epoch ms)   3 max attempts   4 first rest (ms); each further one is twice as long   5 ticket
-- Returns {'resting', ms}   taken back; its lease passes when the rest is over: ask again then
--         {'queued'}        it waits again, where it waited before
--         {'no'}            its lease lives, it streamed text, nobody waits for it, it has no tries or time left, or is done
-- Example: EVAL ... aiscale:job:j1 aiscale:leases aiscale:queue:m aiscale:queued:m aiscale:celery:model.m  j1 1700000009000 3 1000 {...}
--          -> {'resting', '1000'}
-- Atomic: of two reapers one gets it. The rest is in Redis, so a reaper that dies forgets nothing.
local now = tonumber(ARGV[2])
local record = redis.call('HMGET', KEYS[1], 'state', 'streamed', 'attempt', 'deadline_ms', 'cancelled', 'resting', 'tier',
  'organization', 'tokens', 'weight', 'seq', 'queued_at_ms')
local lease = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not record[1] or record[1] == 'done' or record[5] or (lease and tonumber(lease) > now) or tonumber(record[4]) <= now then
  return {'no'}
end
if record[6] then
  redis.call('HDEL', KEYS[1], 'resting')
  redis.call('ZADD', KEYS[2], record[4], ARGV[1])
  join(KEYS[3], KEYS[4], ARGV[1], {tier = record[7], organization = record[8], tokens = record[9], seq = record[11],
    queued_at_ms = record[12], deadline_ms = record[4]}, now)
  call(KEYS[3], KEYS[5], now, ARGV[5])
  return {'queued'}
end
if record[1] ~= 'running' or record[2] == '1' or tonumber(record[3]) >= tonumber(ARGV[3]) then return {'no'} end
local rest = tonumber(ARGV[4]) * 2 ^ (tonumber(record[3]) - 1)
redis.call('HSET', KEYS[1], 'state', 'queued', 'worker', '', 'resting', 1)
redis.call('ZREM', KEYS[3] .. ':running', ARGV[1])
redis.call('ZADD', KEYS[2], math.min(now + rest, tonumber(record[4])), ARGV[1])
give_back(KEYS[3], record[7], record[8], length_of(record[9], record[10]))
return {'resting', string.format('%.0f', rest)}
