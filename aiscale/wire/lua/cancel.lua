-- Write down that nobody waits for a job any more: take it out of the queue, or tell its worker. Uses queue.lua.
--
-- KEYS  1 job record (hash)   2 leases (zset)
-- ARGV  1 job id   2 reason   3 now (epoch ms)   4 control channel   5 encoded Control(cancel)
--       6, 7 beginnings of the names of queue state and queued jobs, which the model's name ends
-- Returns 1 when the order was given, 0 when the job has ended or is unknown (nothing changed).
-- Example: EVAL ... aiscale:job:j1 aiscale:leases  j1 disconnected 1700000000000 aiscale:control <bytes> aiscale:queue: aiscale:queued:
--          -> 1
-- Atomic: a record that has expired is not made anew. A job that waited gives up its place at once, and its lease: the reaper ends it.
local record = redis.call('HMGET', KEYS[1], 'state', 'model', 'tier', 'organization', 'tokens')
if not record[1] or record[1] == 'done' then return 0 end
redis.call('HSET', KEYS[1], 'cancelled', ARGV[2])
if record[1] == 'queued' then
  leave(ARGV[6] .. record[2], ARGV[7] .. record[2], ARGV[1], record[3], record[4], record[5])
  redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
else
  redis.call('PUBLISH', ARGV[4], ARGV[5])
end
return 1
