-- Write a job's record before its message is sent, so that the reaper answers for it from then on.
--
-- KEYS  1 job record (hash)   2 leases (zset)   3 queued jobs of the model (zset)
-- ARGV  1 job id   2 kind (generate|encode)   3 payload   4 celery queue   5 deadline (epoch ms)   6 record TTL (s)
-- Returns 1 when written, 0 when the job id was known already (nothing changed).
-- Example: EVAL ... aiscale:job:j1 aiscale:leases aiscale:queued:m  j1 generate {...} model.m 1700000300000 900  -> 1
-- Atomic: record, lease and depth are written together or not at all.
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'kind', ARGV[2], 'payload', ARGV[3], 'queue', ARGV[4], 'state', 'queued',
  'attempt', 0, 'worker', '', 'streamed', 0, 'deadline_ms', ARGV[5], 'depth_key', KEYS[3])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', KEYS[2], ARGV[5], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[5], ARGV[1])
return 1
