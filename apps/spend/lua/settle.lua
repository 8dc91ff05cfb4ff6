-- End the holds of finished jobs, take over what their scopes spent, correct the count of tokens, and acknowledge the jobs' events.
--
-- KEYS  1 finished (stream)   then, as ARGV[2] says, two for each scope: spend (hash), holds (zset of <job id>:<nano-USD>); the
--       token windows (hashes) and the requests in flight (zsets)
-- ARGV  1 consumer group
--       2 JSON {entries: [stream entry id, ...],
--               scopes: [{key: index of its first key, in_flight: index of that key or 0, jobs: [job id, ...] in there,
--                         holds: [<job id>:<nano-USD>, ...],
--                         totals: [{period, start_ms, end_ms, spent_nanousd, revision}, ...],
--                         refunds: {hold: [{key: index of a token window, second: which one, tokens: how many too many}]}}, ...]}
--         Money and times are texts: they are whole numbers, and stay exact.
-- Returns the number of holds that were ended.
-- Example: EVAL ... aiscale:finished aiscale:spend:site aiscale:holds:site  settlement
--          {"entries": ["1700000000000-0"], "scopes": [{"key": 2, "in_flight": 0, "holds": ["job_1:5000"], "totals": [{"period": "monthly",
--          "start_ms": "1698796800000", "end_ms": "1701388800000", "spent_nanousd": "4200", "revision": 7}], "refunds": {}}]}  -> 1
-- Atomic: a hold ends in the step in which its cost is counted as spent, so at no moment do both or neither count.
--
-- What was spent is not added up here: it is a row of Postgres (apps/spend/totals.py), and the newer revision of it wins. So this
-- script may run again, late or in any order. A copy that is missing stays so: it is rebuilt from those rows.
local task = cjson.decode(ARGV[2])
local function int(value) return string.format('%.0f', value) end
local ended = 0

for _, scope in ipairs(task.scopes) do
  local spend, holds = KEYS[scope.key], KEYS[scope.key + 1]
  local freed = 0
  if #scope.holds > 0 then
    for i, score in ipairs(redis.call('ZMSCORE', holds, unpack(scope.holds))) do
      -- a hold that is there is one that was not ended before: its tokens are corrected once
      if score then
        local hold = scope.holds[i]
        freed = freed + tonumber(string.match(hold, ':(%d+)$'))
        for _, refund in ipairs(scope.refunds[hold] or {}) do
          -- a job that was admitted while there was no limit was not counted: at most what its second holds goes back
          local tokens = math.min(refund.tokens, tonumber(redis.call('HGET', KEYS[refund.key], refund.second) or 0))
          if tokens > 0 then
            redis.call('HINCRBY', KEYS[refund.key], refund.second, int(-tokens))
            redis.call('HINCRBY', KEYS[refund.key], 'used', int(-tokens))
          end
        end
      end
    end
    ended = ended + redis.call('ZREM', holds, unpack(scope.holds))
    -- those that ended left already; one that was never sent leaves now
    if scope.in_flight > 0 then redis.call('ZREM', KEYS[scope.in_flight], unpack(scope.jobs)) end
  end
  local held = redis.call('HGET', spend, 'held_nanousd')
  if held then
    if freed > 0 then redis.call('HSET', spend, 'held_nanousd', int(math.max(tonumber(held) - freed, 0))) end
    for _, total in ipairs(scope.totals) do
      local p = total.period
      local copy = redis.call('HMGET', spend, p .. '_start_ms', p .. '_end_ms', p .. '_revision')
      if copy[1] == total.start_ms and copy[2] == total.end_ms and tonumber(copy[3]) < total.revision then
        redis.call('HSET', spend, p .. '_spent_nanousd', total.spent_nanousd, p .. '_revision', int(total.revision))
      end
    end
  end
end
if #task.entries > 0 then redis.call('XACK', KEYS[1], ARGV[1], unpack(task.entries)) end
return ended
