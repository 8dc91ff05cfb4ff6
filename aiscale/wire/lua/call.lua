-- Send a ticket for jobs that wait although none is on its way: a worker died with it. Uses queue.lua.
--
-- KEYS  1 queue state (hash)   2 queued jobs of the model (zset)   3 Celery's queue (list)
-- ARGV  1 now (epoch ms)   2 ticket
-- Returns 1 when one was sent, 0 when there was no need.
-- Example: EVAL ... aiscale:queue:m aiscale:queued:m aiscale:celery:model.m  1700000000000 {...}  -> 1
-- Atomic: of two that look at once, one sends it.
if redis.call('EXISTS', KEYS[2]) == 0 or redis.call('LLEN', KEYS[3]) > 0 then return 0 end
return call(KEYS[1], KEYS[3], tonumber(ARGV[1]), ARGV[2])
