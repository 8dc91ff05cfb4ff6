-- Forget a job that has ended, so that its id can be used again before its record expires.
--
-- KEYS  1 job record (hash)
-- ARGV  none
-- Returns 1 when there is no record any more, 0 when the job still waits or runs (nothing changed).
-- Example: EVAL ... aiscale:job:j1  -> 1
-- Atomic: a job that runs again by now is left alone.
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'done' then return 0 end
redis.call('DEL', KEYS[1])
return 1
