-- Write a scope's fast copy: its budgets, and what Postgres says was spent. Holds that are in Redis stay and are summed up anew.
--
-- KEYS  1 spend (hash)   2 holds (zset of <job id>:<nano-USD>)
-- ARGV  1 definition of the scope's budgets   then eight for each period: period, start_ms, end_ms (epoch ms), spent (nano-USD),
--       revision, limit (nano-USD; '' = none, 'plan' = the plan's), raise (nano-USD), raise until (epoch ms)
-- Returns 1.
-- Example: EVAL ... aiscale:spend:site aiscale:holds:site  monthly|UTC|5000|0|0 monthly 1698796800000 1701388800000 4200 7 5000 0 0
--          -> 1
-- Atomic: spent, held and limits are of one moment. Of two revisions of one period the newer one stays, whoever comes last.
local fields, kept = {'definition', ARGV[1]}, {}
for i = 2, #ARGV, 8 do
  local p = ARGV[i]
  local spent, revision = ARGV[i + 3], ARGV[i + 4]
  local copy = redis.call('HMGET', KEYS[1], p .. '_start_ms', p .. '_end_ms', p .. '_spent_nanousd', p .. '_revision')
  if copy[1] == ARGV[i + 1] and copy[2] == ARGV[i + 2] and tonumber(copy[4]) > tonumber(revision) then
    spent, revision = copy[3], copy[4]
  end
  for _, pair in ipairs({{'start_ms', ARGV[i + 1]}, {'end_ms', ARGV[i + 2]}, {'spent_nanousd', spent}, {'revision', revision},
    {'limit_nanousd', ARGV[i + 5]}, {'raise_nanousd', ARGV[i + 6]}, {'raise_until_ms', ARGV[i + 7]}}) do
    fields[#fields + 1], fields[#fields + 2] = p .. '_' .. pair[1], pair[2]
  end
end
local held = 0
for _, hold in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do held = held + tonumber(string.match(hold, ':(%d+)$')) end
fields[#fields + 1], fields[#fields + 2] = 'held_nanousd', string.format('%.0f', held)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(fields))
return 1
