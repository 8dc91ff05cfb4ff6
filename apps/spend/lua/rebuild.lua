-- Replace an organization's fast copy with what the ledger says. Holds that are in Redis stay and are summed up anew.
--
-- KEYS  1 spend (hash)   2 hold amounts (hash)
-- ARGV  1 the copy's version before the ledger was read ('' = none)   2 month (YYYY-MM, UTC)   3 spent in it (nano-USD)
--       4 the organization's own limit (nano-USD; '' = the plan's)
-- Returns 1 when written; 0, having written nothing, when the version is another by now or the copy is of a later month: read the
--   ledger again.
-- Example: EVAL ... aiscale:spend:org_1 aiscale:holdamounts:org_1  7 2023-11 4200 ''  -> 1
-- Atomic: spent, held and limit are of one moment.
local stored = redis.call('HMGET', KEYS[1], 'version', 'period')
if (stored[1] or '') ~= ARGV[1] then return 0 end
if stored[2] and stored[2] > ARGV[2] then return 0 end
local held = 0
for _, amount in ipairs(redis.call('HVALS', KEYS[2])) do held = held + tonumber(amount) end
redis.call('HSET', KEYS[1], 'period', ARGV[2], 'spent_nanousd', ARGV[3], 'held_nanousd', string.format('%.0f', held),
  'limit_nanousd', ARGV[4])
redis.call('HINCRBY', KEYS[1], 'version', 1)
return 1
