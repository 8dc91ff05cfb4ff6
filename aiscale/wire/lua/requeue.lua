-- Take a job back from a worker that died before its first token, for another try.
--
-- KEYS  1 job record (hash)   2 leases (zset)   3 queued jobs of the model (zset)
-- ARGV  1 job id   2 now (epoch ms)   3 max attempts
-- Returns {'requeued', kind, payload, queue, attempt} or {'no'}: its lease lives, it streamed text, has no tries left, or is done.
-- Example: EVAL ... aiscale:job:j1 aiscale:leases aiscale:queued:m  j1 1700000009000 3  -> {'requeued','generate','{...}','model.m','1'}
-- Atomic: of two reapers one gets it.
local record = redis.call('HMGET', KEYS[1], 'state', 'streamed', 'attempt', 'deadline_ms', 'kind', 'payload', 'queue')
if record[1] ~= 'running' or record[2] == '1' or tonumber(record[3]) >= tonumber(ARGV[3]) then return {'no'} end
local lease = redis.call('ZSCORE', KEYS[2], ARGV[1])
if (lease and tonumber(lease) > tonumber(ARGV[2])) or tonumber(record[4]) <= tonumber(ARGV[2]) then return {'no'} end
redis.call('HSET', KEYS[1], 'state', 'queued', 'worker', '')
redis.call('ZADD', KEYS[2], record[4], ARGV[1])
redis.call('ZADD', KEYS[3], record[4], ARGV[1])
return {'requeued', record[5], record[6], record[7], record[3]}
