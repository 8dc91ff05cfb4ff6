-- Write the record of a job that a web process has an upstream compute: it runs from the start, under that process's lease.
--
-- KEYS  1 job record (hash)   2 leases (zset)
-- ARGV  1 job id   2 payload   3 model   4 deadline (epoch ms)   5 record TTL (s)   6 who runs it   7 lease end (epoch ms)
--       8 organization   9 names of the in-flight sets that count it, between spaces   10 most attempts   11 prompt tokens, as far as known
--       12 kind (generate|encode)
-- Returns 1 when written, 0 when the job id was known already (nothing changed).
-- Example: EVAL ... aiscale:job:j1 aiscale:leases  j1 {...} m 1700000300000 900 web-1 1700000006000 org_1 aiscale:inflight:organization:org_1
--          3 17 generate  -> 1
-- Atomic: record and lease together. It has no tries left: when the lease passes, the reaper ends it and charges what was seen.
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'kind', ARGV[12], 'payload', ARGV[2], 'model', ARGV[3], 'state', 'running', 'attempt', ARGV[10],
  'worker', ARGV[6], 'streamed', 0, 'deadline_ms', ARGV[4], 'tier', 9, 'organization', ARGV[8], 'tokens', 0, 'weight', 1, 'seq', 0,
  'in_flight', ARGV[9], 'seen_prompt_tokens', ARGV[11], 'seen_completion_tokens', 0)
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[7], ARGV[1])
return 1
