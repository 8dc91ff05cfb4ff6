-- Decide whether one request may run, and hold the most it can cost. The one gate: all checks and the hold are one script.
--
-- KEYS  1 api key (hash; '' for a browser session)   2 organization (hash)   3 plan (hash)   4 killed (hash)   5 spend (hash)
--       6 holds (zset)   7 hold amounts (hash)   8 rate (hash)   9 queued jobs of the model (zset)
-- ARGV  1 job id   2 organization id   3 plan slug   4 model slug   5 worst cost (nano-USD)   6 now (epoch ms)
--       7 hold expiry (epoch ms)   8 month (YYYY-MM, UTC)   9 most jobs that may wait for the model   10 provider of the model
-- Returns one of (all members are text):
--   {'admitted', limit, remaining, reset_ms}              the hold is placed and the request is counted; a job id that holds
--                                                         already is answered so again and counted once
--   {'load', 'identity' | 'killed' | 'spend'}             that copy is missing in Redis: refill it and ask again
--   {'plan', slug}                                        the organization has another plan by now: ask again with that plan's key
--   {'refused', code}                                     invalid_api_key, key_revoked, key_expired or account_inactive
--   {'refused', code, limit, remaining, reset_ms, ...}    then, by code:
--     killed              scope, reason, epoch ms at which it ends by itself ('' = when it is released)
--     model_not_allowed   (nothing)
--     rate_limit_exceeded retry_ms, window_s
--     too_many_in_flight  in flight, most allowed
--     queue_full          waiting, most allowed
--     insufficient_quota  spent, held, limit (nano-USD)
-- Example: EVAL ... aiscale:key:ab.. aiscale:org:org_1 aiscale:plan:free aiscale:killed aiscale:spend:org_1 aiscale:holds:org_1
--          aiscale:holdamounts:org_1 aiscale:rate:org_1 aiscale:queued:m  job_1 org_1 free m 5000 1700000000000 1700000360000 2023-11 256 local
--          -> {'admitted', '20', '19', '3660000'}
-- Atomic: every write stands below the last check, so a refusal, a 'load' or a 'plan' leaves every key as it was.
--
-- The rate window slides in sixtieths: a request counts until its whole sixtieth is older than the window, so no stretch of time
-- as long as the window ever sees more than the limit, and a slot comes back at most one sixtieth late.
local job, organization, model = ARGV[1], ARGV[2], ARGV[4]
local worst, now, month = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[8]

local function int(value) return string.format('%.0f', value) end

-- who
local scopes = {'site', 'model:' .. model, 'plan:' .. ARGV[3], 'organization:' .. organization, 'provider:' .. ARGV[10]}
if KEYS[1] ~= '' then
  local key = redis.call('HMGET', KEYS[1], 'state', 'expires_at_ms', 'organization_id', 'key_id')
  if not key[1] then return {'load', 'identity'} end
  if key[3] ~= organization then return {'refused', 'invalid_api_key'} end
  if key[1] == 'expired' or (key[2] and key[2] ~= '' and tonumber(key[2]) <= now) then return {'refused', 'key_expired'} end
  if key[1] ~= 'active' then return {'refused', 'key_revoked'} end
  if key[4] then scopes[#scopes + 1] = 'key:' .. key[4] end
end
local org = redis.call('HMGET', KEYS[2], 'plan', 'state')
if not (org[1] and org[2]) then return {'load', 'identity'} end
if org[2] ~= 'active' then return {'refused', 'account_inactive'} end
if org[1] ~= ARGV[3] then return {'plan', org[1]} end

-- the copies that the checks need
local plan = redis.call('HMGET', KEYS[3], 'requests_per_window', 'window_s', 'max_in_flight', 'monthly_limit_nanousd', 'models')
for field = 1, 5 do if not plan[field] then return {'load', 'identity'} end end
if redis.call('HEXISTS', KEYS[4], 'loaded') == 0 then return {'load', 'killed'} end
local spend = redis.call('HMGET', KEYS[5], 'period', 'spent_nanousd', 'held_nanousd', 'limit_nanousd')
for field = 1, 4 do if not spend[field] then return {'load', 'spend'} end end

-- the rate's state: requests in the window, by sixtieth
local limit, window_s = tonumber(plan[1]), tonumber(plan[2])
local unit_ms = math.ceil(window_s * 1000 / 60)
local units = math.ceil(window_s * 1000 / unit_ms)
local current = math.floor(now / unit_ms)
local stored = redis.call('HGETALL', KEYS[8])
local stored_unit_ms = unit_ms
for i = 1, #stored, 2 do if stored[i] == 'unit_ms' then stored_unit_ms = tonumber(stored[i + 1]) end end
local counts, stale, used, newest = {}, {}, 0, nil
for i = 1, #stored, 2 do
  local index, count = tonumber(stored[i]), tonumber(stored[i + 1])
  if index then
    -- another plan's sixtieths: a request is taken to have come at the end of its own, but not later than now
    if stored_unit_ms ~= unit_ms then index = math.floor(math.min((index + 1) * stored_unit_ms - 1, now) / unit_ms) end
    if index >= current - units then
      counts[index] = (counts[index] or 0) + count
      used = used + count
      if not newest or index > newest then newest = index end
    else
      stale[#stale + 1] = stored[i]
    end
  end
end
local function full_again_ms() return newest and (newest + units + 1) * unit_ms - now or 0 end
local function refuse(code, ...)
  return {'refused', code, int(limit), int(math.max(limit - used, 0)), int(full_again_ms()), ...}
end

-- what is stopped, and what the plan has
local orders = redis.call('HMGET', KEYS[4], unpack(scopes))
for i, scope in ipairs(scopes) do
  if orders[i] then
    -- an order ends at its time by itself, whatever happens to those who tidy up
    local ends_at, reason = string.match(orders[i], '^(%d*)|(.*)$')
    if not ends_at then ends_at, reason = '', orders[i] end
    if ends_at == '' or now < tonumber(ends_at) then return refuse('killed', scope, reason, ends_at) end
  end
end
if plan[5] ~= '*' and not string.find(',' .. plan[5] .. ',', ',' .. model .. ',', 1, true) then
  return refuse('model_not_allowed')
end
-- a client that lost the answer and asked again is admitted once
if redis.call('ZSCORE', KEYS[6], job) then
  return {'admitted', int(limit), int(math.max(limit - used, 0)), int(full_again_ms())}
end

-- the rate
if used >= limit then
  local indexes = {}
  for index in pairs(counts) do indexes[#indexes + 1] = index end
  table.sort(indexes)
  local over, retry_ms = used - limit + 1, window_s * 1000
  for _, index in ipairs(indexes) do
    over = over - counts[index]
    if over <= 0 then retry_ms = (index + units + 1) * unit_ms - now break end
  end
  return refuse('rate_limit_exceeded', int(retry_ms), int(window_s))
end

-- in flight: holds that have expired count no more
local expired = redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now)
local in_flight = redis.call('ZCARD', KEYS[6]) - #expired
if in_flight >= tonumber(plan[3]) then return refuse('too_many_in_flight', int(in_flight), plan[3]) end

-- the model's queue: a job past its deadline waits no more
local waiting = redis.call('ZCOUNT', KEYS[9], '(' .. int(now), '+inf')
if waiting >= tonumber(ARGV[9]) then return refuse('queue_full', int(waiting), ARGV[9]) end

-- the budget: the whole worst case fits, or nothing is held
local new_month = month > spend[1]
-- below zero is credit, which goes along into the new month (apps/spend/carryover.py)
local spent = tonumber(spend[2])
if new_month then spent = math.min(spent, 0) end
local held = tonumber(spend[3])
for _, id in ipairs(expired) do held = held - tonumber(redis.call('HGET', KEYS[7], id) or 0) end
local most = tonumber(spend[4] ~= '' and spend[4] or plan[4])
if spent + held + worst > most then return refuse('insufficient_quota', int(spent), int(held), int(most)) end

-- admitted: from here on it only writes
for _, id in ipairs(expired) do
  redis.call('ZREM', KEYS[6], id)
  redis.call('HDEL', KEYS[7], id)
end
redis.call('ZADD', KEYS[6], ARGV[7], job)
redis.call('HSET', KEYS[7], job, ARGV[5])
redis.call('HSET', KEYS[5], 'held_nanousd', int(held + worst))
if new_month then
  redis.call('HSET', KEYS[5], 'period', month, 'spent_nanousd', int(spent))
  redis.call('HINCRBY', KEYS[5], 'version', 1)
end
if stored_unit_ms ~= unit_ms then
  redis.call('DEL', KEYS[8])
  for index, count in pairs(counts) do redis.call('HSET', KEYS[8], int(index), int(count)) end
else
  for _, field in ipairs(stale) do redis.call('HDEL', KEYS[8], field) end
end
redis.call('HSET', KEYS[8], 'unit_ms', int(unit_ms))
redis.call('HINCRBY', KEYS[8], int(current), 1)
redis.call('PEXPIRE', KEYS[8], int((units + 2) * unit_ms))
used = used + 1
if not newest or current > newest then newest = current end
return {'admitted', int(limit), int(limit - used), int(full_again_ms())}
