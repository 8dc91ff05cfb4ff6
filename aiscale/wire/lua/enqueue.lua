-- Write a job's record, put it into its organization's lane, and send a ticket for a worker. Uses queue.lua.
--
-- KEYS  1 job record (hash)   2 leases (zset)   3 queue state (hash)   4 queued jobs of the model (zset)   5 Celery's queue (list)
--       6 queues (hash)   7 holds of the organization (zset; may be left out)
-- ARGV  1 job id   2 kind (generate|encode)   3 payload   4 model   5 deadline (epoch ms)   6 record TTL (s)   7 now (epoch ms)
--       8 tier (one of TIERS)   9 organization   10 tokens that it may use   11 weight of the organization   12 ticket   13 names of the in-flight sets that count it, between spaces
--       14 the job's hold (with KEYS 7)   15 most jobs that may wait for the model (may be left out)
-- Returns 1 when written, 0 when the job id was known already, -1 when its hold is gone: Redis was emptied since it was admitted
--   (nothing changed). {jobs that wait, ms after which to come again} when there is no room left: the gate counts those that wait, not
--   those that it admitted beside this one (nothing changed).
-- Example: EVAL ... aiscale:job:j1 aiscale:leases aiscale:queue:m aiscale:queued:m aiscale:celery:model.m aiscale:queues
--          j1 generate {...} m 1700000300000 900 1700000000000 3 org_1 540 1 {...} aiscale:inflight:organization:org_1  -> 1
-- Atomic: record, lease, place and ticket are written together or not at all, so a web process that dies leaves nothing half done.
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
-- what runs without a hold is money that nobody counted
if KEYS[7] and not redis.call('ZSCORE', KEYS[7], ARGV[14]) then return -1 end
local now = tonumber(ARGV[7])
if ARGV[15] then
  local most = tonumber(ARGV[15])
  local queue = look_at_queue(KEYS[3], KEYS[4], now, tonumber(ARGV[8]), ARGV[9], ARGV[11], most)
  local overflow, again_in_ms = find_overflow(queue, most, nil)
  if overflow then return {string.format('%.0f', queue.waiting), string.format('%.0f', again_in_ms)} end
end
local seq = redis.call('HINCRBY', KEYS[3], 'seq', 1)
redis.call('HSET', KEYS[1], 'kind', ARGV[2], 'payload', ARGV[3], 'model', ARGV[4], 'state', 'queued', 'attempt', 0, 'worker', '',
  'streamed', 0, 'deadline_ms', ARGV[5], 'queued_at_ms', ARGV[7], 'tier', ARGV[8], 'organization', ARGV[9], 'tokens', ARGV[10],
  'weight', ARGV[11], 'seq', seq, 'in_flight', ARGV[13])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', KEYS[2], ARGV[5], ARGV[1])
redis.call('HSET', KEYS[6], ARGV[4], ARGV[2])
join(KEYS[3], KEYS[4], ARGV[1], {tier = ARGV[8], organization = ARGV[9], tokens = ARGV[10], seq = seq, queued_at_ms = ARGV[7],
  deadline_ms = ARGV[5]}, now)
call(KEYS[3], KEYS[5], now, ARGV[12])
return 1
