-- Give a worker the next jobs of a model, in their fair order. Uses queue.lua.
--
-- KEYS  1 queue state (hash)   2 queued jobs of the model (zset)   3 leases (zset)   4 Celery's queue (list)
-- ARGV  1 worker id   2 now (epoch ms)   3 lease end (epoch ms)   4 most jobs   5 most tokens of several jobs together
--       6 beginning of the records' names   7 1 when a ticket brought the worker here, else 0   8 ticket
--       9 milliseconds within which the worker asks again, unless it gets much to do; until then nobody needs to call
-- Returns {jobs that still wait, {job id, attempt, payload}, ...}. What waits on gets a ticket of its own, so that another worker comes.
-- Example: EVAL ... aiscale:queue:m aiscale:queued:m aiscale:leases aiscale:celery:model.m
--          w1 1700000000000 1700000006000 64 4096 aiscale:job: 1 {...} 10  -> {'0', {'j1', '1', '{...}'}}
-- Atomic: of two workers that ask at once, each gets its own jobs. A ticket too many gets none.
local q, now = KEYS[1], tonumber(ARGV[2])
local most_jobs, most_tokens = tonumber(ARGV[4]), tonumber(ARGV[5])
if ARGV[7] == '1' then redis.call('HDEL', q, 'call_after_ms') end
local SOON_DONE_TOKENS = 128
local taken, tokens = {}, 0
while #taken < most_jobs do
  local tier = urgent_tier(q)
  if not tier then break end
  local turn = redis.call('ZRANGE', q .. ':' .. tier .. ':turns', 0, 0, 'WITHSCORES')
  local organization, start = turn[1], tonumber(turn[2])
  local job = redis.call('ZRANGE', q .. ':' .. tier .. ':lane:' .. organization, 0, 0)[1]
  local record = redis.call('HMGET', ARGV[6] .. job, 'state', 'deadline_ms', 'tokens', 'weight', 'payload')
  local cost = number(record[3])
  if record[1] ~= 'queued' or tonumber(record[2]) <= now then
    -- nobody waits for it any more; the reaper ends what has a record
    leave(q, KEYS[2], job, tier, organization, cost)
  elseif #taken > 0 and tokens + cost > most_tokens then
    break
  else
    serve(q, tier, organization, start, length_of(cost, record[4]))
    leave(q, KEYS[2], job, tier, organization, cost)
    redis.call('ZADD', q .. ':running', now, job)
    redis.call('HSET', ARGV[6] .. job, 'state', 'running', 'worker', ARGV[1], 'beside', redis.call('ZCARD', q .. ':running'))
    redis.call('ZADD', KEYS[3], ARGV[3], job)
    taken[#taken + 1] = {job, tostring(redis.call('HINCRBY', ARGV[6] .. job, 'attempt', 1)), record[5]}
    tokens = tokens + cost
  end
end
local left = redis.call('ZCARD', KEYS[2])
if left > 0 then
  call(q, KEYS[4], now, ARGV[8])
elseif ARGV[9] == '0' or tokens > SOON_DONE_TOKENS then
  redis.call('HDEL', q, 'call_after_ms')
else
  redis.call('HSET', q, 'call_after_ms', now + tonumber(ARGV[9]))
end
return {tostring(left), unpack(taken)}
