-- Write down that nobody waits for a job any more, and tell its worker.
--
-- KEYS  1 job record (hash)
-- ARGV  1 reason   2 control channel   3 encoded Control(cancel)
-- Returns 1 when the order was given, 0 when the job has ended or is unknown (nothing changed).
-- Example: EVAL ... aiscale:job:j1  disconnected aiscale:control <bytes>  -> 1
-- Atomic: a record that has expired is not made anew.
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'done' then return 0 end
redis.call('HSET', KEYS[1], 'cancelled', ARGV[1])
redis.call('PUBLISH', ARGV[2], ARGV[3])
return 1
