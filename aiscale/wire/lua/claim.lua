-- Let one worker take a job; a message that is delivered twice is answered once.
--
-- KEYS  1 job record (hash)   2 leases (zset)   3 queued jobs of the model (zset)
-- ARGV  1 job id   2 worker id   3 now (epoch ms)   4 lease end (epoch ms)
-- Returns {'claimed', attempt} or {refusal, detail}:
--   'gone'       no record: finished long ago, or never admitted            'done'     finished already
--   'running'    another worker holds a living lease                        'streamed' text was sent before: the reaper ends it
--   'cancelled'  the caller left before a worker came (detail = reason); the claim is made, so that the worker can finish it
-- Example: EVAL ... aiscale:job:j1 aiscale:leases aiscale:queued:m  j1 w1 1700000000000 1700000006000  -> {'claimed', '1'}
-- Atomic: of two workers that ask at once, one gets it.
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'streamed', 'cancelled', 'worker')
local state = record[1]
if not state then return {'gone', ''} end
if state == 'done' then return {'done', ''} end
if state == 'running' then
  local lease = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if lease and tonumber(lease) > tonumber(ARGV[3]) and record[5] ~= ARGV[2] then return {'running', record[5]} end
  if record[3] == '1' then return {'streamed', ''} end
end
local attempt = tonumber(record[2]) + 1
redis.call('HSET', KEYS[1], 'state', 'running', 'worker', ARGV[2], 'attempt', attempt)
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
if record[4] then return {'cancelled', record[4]} end
return {'claimed', tostring(attempt)}
