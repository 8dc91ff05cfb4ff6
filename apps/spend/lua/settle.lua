-- End the holds of finished jobs of one organization, add what they cost to what it spent, and acknowledge their events.
--
-- KEYS  1 spend (hash)   2 holds (zset)   3 hold amounts (hash)   4 finished (stream)
-- ARGV  1 consumer group   2 'charge' or 'drop'   3 the copy's version before the ledger was written ('' = none; unread by 'drop')
--       4... four for each job: stream entry id ('' = none), job id, cost (nano-USD), month it belongs to (YYYY-MM, UTC)
-- Returns 1 when done. 'charge' returns 0, having written nothing, when the version is another by now: somebody has rebuilt or
--   charged this copy since, so it may hold these costs already. The caller rebuilds it from the ledger, then calls 'drop', which
--   ends holds and acknowledges without adding a cost.
-- Example: EVAL ... aiscale:spend:org_1 aiscale:holds:org_1 aiscale:holdamounts:org_1 aiscale:finished
--          settlement charge 7 1700000000000-0 job_1 4200 2023-11  -> 1
-- Atomic: hold, cost and acknowledgement of all named jobs together or not at all; so an entry that is still pending was never added.
local charge = ARGV[2] == 'charge'
local spend = redis.call('HMGET', KEYS[1], 'period', 'spent_nanousd', 'held_nanousd', 'version')
if charge and (spend[4] or '') ~= ARGV[3] then return 0 end
local period, spent, held = spend[1], tonumber(spend[2] or 0), tonumber(spend[3] or 0)

for i = 4, #ARGV, 4 do
  local entry, job, cost, month = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3]
  if redis.call('ZREM', KEYS[2], job) == 1 then
    held = math.max(held - tonumber(redis.call('HGET', KEYS[3], job) or 0), 0)
    redis.call('HDEL', KEYS[3], job)
  end
  if charge and period then
    -- below zero is credit, which goes along into the new month (apps/spend/carryover.py)
    if month > period then period, spent = month, math.min(spent, 0) end
    -- what ended in a month that is over was that month's
    if month == period then spent = spent + cost end
  end
  if entry ~= '' then redis.call('XACK', KEYS[4], ARGV[1], entry) end
end

-- a copy that is missing stays so: it is rebuilt from the ledger, which has these costs already
if period then
  redis.call('HSET', KEYS[1], 'period', period, 'spent_nanousd', string.format('%.0f', spent),
    'held_nanousd', string.format('%.0f', held))
end
if charge then redis.call('HINCRBY', KEYS[1], 'version', 1) end
return 1
