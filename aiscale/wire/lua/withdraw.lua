-- Forget a job of which nobody knows whether it was queued: its caller is told that it was not. Uses queue.lua.
--
-- KEYS  1 job record (hash)   2 leases (zset)   3 queue state (hash)   4 queued jobs of the model (zset)
-- ARGV  1 job id
-- Returns 1 when it was there, else 0. A worker that has it by now drops it at its next heartbeat, and it is not charged.
-- Example: EVAL ... aiscale:job:j1 aiscale:leases aiscale:queue:m aiscale:queued:m  j1  -> 1
-- Atomic: place, lease and record go together.
local record = redis.call('HMGET', KEYS[1], 'state', 'tier', 'organization', 'tokens')
if not record[1] or record[1] == 'done' then return 0 end
leave(KEYS[3], KEYS[4], ARGV[1], record[2], record[3], record[4])
redis.call('ZREM', KEYS[3] .. ':running', ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('DEL', KEYS[1])
return 1
