-- Decide whether one request may run, and hold the most it can cost. The one gate: all checks and the hold are one script. Uses queue.lua.
--
-- KEYS  1 api key (hash; '' for a browser session)   2 organization (hash)   3 plan (hash)   4 killed (hash)   5 budgets (hash)
--       6 queue state of the model (hash, and the beginning of the names of its lanes)
--       7, 8 requests and tokens in the windows of the organization (hashes)
--       9, 10 the same of the key ('' for a browser session)
--       11, 12 requests in flight of the organization, and of the key ('' for a browser session) (zsets)
--       13 queued jobs of the model (zset)   14 when a worker that serves the model was heard of last (string)   15 epoch (string)
--       16 finished (stream), when the answer is known, else ''
--       17 how often the cache was purged (hash), when ARGV 17 is to be checked, else ''
--       18... two for each scope: spend (hash), holds (zset of <job id>:<nano-USD>)
-- ARGV  1 job id   2 organization id   3 plan slug   4 model slug   5 worst cost (nano-USD)   6 worst count of tokens   7 now (epoch ms)
--       8 hold expiry (epoch ms)   9 definition of an organization's budget of its own ('monthly|UTC|plan|0|0')
--       10 most jobs that may wait for the model ('' = it waits for none)   11 'admit', 'check' (nothing is counted or held) or 'explain'
--       12 provider of the model
--       13 tier of the request   14 weight of the organization there   15 ms without a worker of the model after which it is refused
--       (0 = never)   16 encoded Finished of a request whose answer is known: it needs no worker, is in flight never, and goes to
--       settlement with the hold ('' = it is to be computed)
--       17 the purges of site, model and organization that the known answer goes by ('0.2.0'; '' = not to be checked)
--       18... the scopes of the request, the narrowest first: key, user, organization, model, plan, site
-- Returns one of (all members are text):
--   {'admitted', RATE}                 the hold is placed and the request is counted; a job id that holds already is answered so again
--                                      and counted once
--   {'load', what...}                  these copies are missing in Redis, or outdated: refill them and ask again. 'identity', 'killed',
--                                      'budgets' or a scope
--   {'purged'}                         the known answer is from before a purge, or Redis has lost the count: look anew
--   {'plan', slug}                     the organization has another plan by now: ask again with that plan's keys
--   {'refused', code}                  invalid_api_key, key_revoked, key_expired or account_inactive; backend_unavailable: Redis was
--                                      emptied, and what it lost is being settled (apps/spend/recovery.py)
--   {'refused', code, RATE, name, value, ...}   then the check's own numbers, as pairs
--   {'explained', {code, 'pass' or 'refuse', name, value, ...}, ...}   every check, when asked to explain; nothing is written
--   RATE is limit, remaining, reset_ms of requests, and the same of tokens ('' where tokens have no limit); the tighter of
--   organization and key
-- Example: EVAL ... '' aiscale:org:org_1 aiscale:plan:free aiscale:killed aiscale:budgets aiscale:queue:m aiscale:rate:organization:org_1
--          aiscale:tokenrate:organization:org_1 '' '' aiscale:inflight:organization:org_1 '' aiscale:queued:m aiscale:served:m aiscale:epoch
--          '' '' aiscale:spend:organization:org_1 aiscale:holds:organization:org_1
--          job_1 org_1 free m 5000 300 1700000000000 1700000360000 monthly|UTC|plan|0|0 256 admit local 9 1 30000 '' '' organization:org_1
--          -> {'admitted', '20', '19', '3660000', '20000', '19700', '61000'}
-- Atomic: every write stands below the last check, so a refusal, a 'load', 'purged' or a 'plan' leaves every key as it was.
--
-- A rate window slides in sixtieths: what was counted stays until its whole sixtieth is older than the window, so no stretch of time as
-- long as the window ever sees more than the limit, and room comes back at most one sixtieth late.
local job, organization, plan_slug, model = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local worst, worst_tokens, now = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local explain = ARGV[11] == 'explain'
local KEYS_BEFORE, ARGS_BEFORE = 17, 17
local is_known = ARGV[16] ~= ''
local PERIODS = {'daily', 'monthly'}

local function int(value) return string.format('%.0f', value) end
local function limit_of(text) return text and text ~= '' and tonumber(text) or nil end

-- the scopes of the request, and where their keys are
local scopes, own = {}, nil
for i = 1, #ARGV - ARGS_BEFORE do
  local at = KEYS_BEFORE + 2 * (i - 1)
  local scope = {name = ARGV[ARGS_BEFORE + i], spend = KEYS[at + 1], holds = KEYS[at + 2]}
  scopes[i] = scope
  if scope.name == 'organization:' .. organization then own = scope end
end

local report = {'explained'}
local refusal, rate
-- Write down a check; true when it refuses and the script is to end with `refusal`.
local function refuses(passed, code, ...)
  if explain then
    report[#report + 1] = {code, passed and 'pass' or 'refuse', ...}
    return false
  end
  if passed then return false end
  refusal = {'refused', code}
  if rate then for _, part in ipairs(rate()) do refusal[#refusal + 1] = part end end
  for _, part in ipairs({...}) do refusal[#refusal + 1] = part end
  return true
end

-- a Redis that forgot does not know what is held
if redis.call('EXISTS', KEYS[15]) == 0 and refuses(false, 'backend_unavailable') then return refusal end

-- a known answer from before a purge is none
if KEYS[17] ~= '' then
  local purges = redis.call('HMGET', KEYS[17], 'site', 'model:' .. model, 'organization:' .. organization, 'loaded')
  for field = 1, 3 do purges[field] = purges[field] or '0' end
  if not purges[4] or table.concat(purges, '.', 1, 3) ~= ARGV[17] then return {'purged'} end
end

-- who
local key = {}
if KEYS[1] ~= '' then
  key = redis.call('HMGET', KEYS[1], 'state', 'expires_at_ms', 'organization_id', 'requests_per_window', 'window_s',
    'tokens_per_minute', 'max_in_flight', 'models')
  for field = 1, 8 do if not key[field] then return {'load', 'identity'} end end
  local expired = key[1] == 'expired' or (key[2] ~= '' and tonumber(key[2]) <= now)
  if refuses(key[3] == organization, 'invalid_api_key') then return refusal end
  if refuses(not expired, 'key_expired', 'expires_at_ms', key[2]) then return refusal end
  if refuses(expired or key[1] == 'active', 'key_revoked', 'state', key[1]) then return refusal end
end
local org = redis.call('HMGET', KEYS[2], 'plan', 'state')
if not (org[1] and org[2]) then return {'load', 'identity'} end
if refuses(org[2] == 'active', 'account_inactive', 'state', org[2]) then return refusal end
if org[1] ~= plan_slug then return {'plan', org[1]} end
local plan = redis.call('HMGET', KEYS[3], 'requests_per_window', 'window_s', 'tokens_per_minute', 'max_in_flight',
  'monthly_limit_nanousd', 'models')
for field = 1, 6 do if not plan[field] then return {'load', 'identity'} end end

-- the copies that the checks need: which scopes have budgets, and what they spent
local names = {}
for i, scope in ipairs(scopes) do names[i] = scope.name end
local orders = redis.call('HMGET', KEYS[4], 'loaded', 'provider:' .. ARGV[12], unpack(names))
local budgets = redis.call('HMGET', KEYS[5], 'loaded', unpack(names))
local missing = {'load'}
if not orders[1] then missing[2] = 'killed' end
if not budgets[1] then missing[#missing + 1] = 'budgets' end
for i, scope in ipairs(scopes) do
  local definition = budgets[i + 1] or (scope == own and ARGV[9])
  if definition then
    local copy = redis.call('HMGET', scope.spend, 'definition', 'held_nanousd',
      'daily_start_ms', 'daily_end_ms', 'daily_spent_nanousd', 'daily_limit_nanousd', 'daily_raise_nanousd', 'daily_raise_until_ms',
      'monthly_start_ms', 'monthly_end_ms', 'monthly_spent_nanousd', 'monthly_limit_nanousd', 'monthly_raise_nanousd',
      'monthly_raise_until_ms')
    local current = copy[1] == definition
    scope.held, scope.budgets = tonumber(copy[2] or 0), {}
    for p, period in ipairs(PERIODS) do
      local at = 6 * p - 3
      if copy[at] then
        -- a period that is over is rolled by those who know the calendar
        if now >= tonumber(copy[at + 1]) then current = false end
        local most = copy[at + 3] == 'plan' and tonumber(plan[5]) or limit_of(copy[at + 3])
        if most and now < tonumber(copy[at + 5]) then most = most + tonumber(copy[at + 4]) end
        scope.budgets[#scope.budgets + 1] =
          {period = period, ends_at_ms = copy[at + 1], spent = tonumber(copy[at + 2]), most = most}
      end
    end
    if not current then missing[#missing + 1] = scope.name end
  end
end
if #missing > 1 then return missing end

-- Look at a rate window: how much of it is used now.
local function look(name, limit, window_s)
  local w = {name = name, limit = limit, window_s = window_s, used = 0, stale = {}}
  w.unit_ms = math.ceil(window_s * 1000 / 60)
  w.units = math.ceil(window_s * 1000 / w.unit_ms)
  w.current = math.floor(now / w.unit_ms)
  w.first = w.current - w.units
  local stored = redis.call('HMGET', name, 'unit_ms', 'used', 'oldest', 'newest', w.current)
  w.counted = 0
  if not stored[1] then return w end
  if tonumber(stored[1]) ~= w.unit_ms then
    -- another plan's sixtieths: what was counted is taken to have come at the end of its own, but not later than now
    w.moved = {}
    local all = redis.call('HGETALL', name)
    for i = 1, #all, 2 do
      local index, count = tonumber(all[i]), tonumber(all[i + 1])
      if index then
        index = math.floor(math.min((index + 1) * tonumber(stored[1]) - 1, now) / w.unit_ms)
        if index >= w.first then
          w.moved[index] = (w.moved[index] or 0) + count
          w.used = w.used + count
          w.oldest, w.newest = math.min(w.oldest or index, index), math.max(w.newest or index, index)
        end
      end
    end
    return w
  end
  w.oldest, w.newest = tonumber(stored[3]), tonumber(stored[4])
  if w.newest < w.first then
    w.moved, w.oldest, w.newest = {}, nil, nil
    return w
  end
  w.used, w.counted = tonumber(stored[2]), tonumber(stored[5] or 0)
  if w.oldest < w.first then
    for index = w.oldest, w.first - 1 do w.stale[#w.stale + 1] = index end
    for _, count in ipairs(redis.call('HMGET', name, unpack(w.stale))) do w.used = w.used - tonumber(count or 0) end
    w.oldest = w.first
  end
  return w
end

-- Return the milliseconds until `amount` fits; nil when it never does.
local function wait_ms(w, amount)
  if amount > w.limit then return nil end
  local counts, indexes = w.moved, {}
  if not counts then
    counts = {}
    local all = redis.call('HGETALL', w.name)
    for i = 1, #all, 2 do
      local index = tonumber(all[i])
      if index and index >= w.first then counts[index] = tonumber(all[i + 1]) end
    end
  end
  for index in pairs(counts) do indexes[#indexes + 1] = index end
  table.sort(indexes)
  local over = w.used + amount - w.limit
  for _, index in ipairs(indexes) do
    over = over - counts[index]
    if over <= 0 then return (index + w.units + 1) * w.unit_ms - now end
  end
  return w.window_s * 1000
end

local function count(w, amount)
  if w.moved then
    redis.call('DEL', w.name)
    for index, moved in pairs(w.moved) do redis.call('HSET', w.name, index, moved) end
    w.counted = w.moved[w.current] or 0
  elseif #w.stale > 0 then
    redis.call('HDEL', w.name, unpack(w.stale))
  end
  local is_new = w.moved or w.newest ~= w.current
  w.used = w.used + amount
  w.oldest, w.newest = math.min(w.oldest or w.current, w.current), math.max(w.newest or w.current, w.current)
  redis.call('HSET', w.name, w.current, w.counted + amount, 'unit_ms', w.unit_ms, 'used', w.used, 'oldest', w.oldest, 'newest', w.newest)
  if is_new then redis.call('PEXPIRE', w.name, (w.units + 2) * w.unit_ms) end
end

local windows = {}
local function add_window(whose, what, name, limit, window_s)
  if limit then
    local w = look(name, limit, window_s)
    w.whose, w.what, w.amount = whose, what, what == 'tokens' and worst_tokens or 1
    windows[#windows + 1] = w
  end
end
add_window('organization', 'requests', KEYS[7], tonumber(plan[1]), tonumber(plan[2]))
add_window('organization', 'tokens', KEYS[8], limit_of(plan[3]), 60)
add_window('key', 'requests', KEYS[9], limit_of(key[4]), limit_of(key[5]))
add_window('key', 'tokens', KEYS[10], limit_of(key[6]), 60)

rate = function()
  local parts = {}
  for _, what in ipairs({'requests', 'tokens'}) do
    local tightest, least
    for _, w in ipairs(windows) do
      local left = math.max(w.limit - w.used, 0)
      if w.what == what and (not least or left < least) then tightest, least = w, left end
    end
    if tightest then
      local again_ms = tightest.used > 0 and (tightest.newest + tightest.units + 1) * tightest.unit_ms - now or 0
      for _, number in ipairs({tightest.limit, least, again_ms}) do parts[#parts + 1] = int(number) end
    else
      for _ = 1, 3 do parts[#parts + 1] = '' end
    end
  end
  return parts
end
local function admitted() return {'admitted', unpack(rate())} end

-- what is stopped, the widest first, and which models may be used
local stopped = false
for i = #scopes + 1, 1, -1 do
  if orders[i + 1] then
    -- an order ends at its time by itself, whatever happens to those who tidy up
    local ends_at, reason = string.match(orders[i + 1], '^(%d*)|(.*)$')
    if not ends_at then ends_at, reason = '', orders[i + 1] end
    if ends_at == '' or now < tonumber(ends_at) then
      stopped = true
      local scope = i > 1 and names[i - 1] or 'provider:' .. ARGV[12]
      if refuses(false, 'killed', 'scope', scope, 'reason', reason, 'ends_at_ms', ends_at) then return refusal end
    end
  end
end
if explain and not stopped then refuses(true, 'killed') end
for _, pair in ipairs({{'plan', plan[6]}, {'key', key[8]}}) do
  local whose, models = pair[1], pair[2]
  if models then
    local allowed = models == '*' or string.find(',' .. models .. ',', ',' .. model .. ',', 1, true) ~= nil
    if (explain or not allowed) and refuses(allowed, 'model_not_allowed', 'whose', whose, 'models', models) then return refusal end
  end
end
-- a client that lost the answer and asked again is admitted once; a hold that has expired is none
local member = job .. ':' .. ARGV[5]
local held_until = redis.call('ZSCORE', own.holds, member)
if held_until and now < tonumber(held_until) then return admitted() end

-- the rates
for _, w in ipairs(windows) do
  local fits = w.used + w.amount <= w.limit
  if explain or not fits then
    local retry_ms = fits and 0 or wait_ms(w, w.amount)
    if refuses(fits, 'rate_limit_exceeded', 'whose', w.whose, 'what', w.what, 'window_s', int(w.window_s), 'limit', int(w.limit),
      'used', int(w.used), 'asked', int(w.amount), 'retry_ms', retry_ms and int(retry_ms) or '') then return refusal end
  end
end

-- in flight: jobs whose hold has expired count no more
for _, pair in ipairs({{'organization', KEYS[11], tonumber(plan[4])}, {'key', KEYS[12], limit_of(key[7])}}) do
  local whose, name, most = pair[1], pair[2], pair[3]
  if name ~= '' and most and not is_known then
    local in_flight = redis.call('ZCOUNT', name, '(' .. int(now), '+inf')
    local fits = in_flight < most
    if (explain or not fits)
      and refuses(fits, 'too_many_in_flight', 'whose', whose, 'in_flight', int(in_flight), 'limit', int(most)) then return refusal end
  end
end

-- the model's queue (aiscale/wire/lua/queue.lua): whether anybody works it off, and whether there is room
if not is_known and ARGV[10] ~= '' then
  local queue_limits = redis.call('HMGET', KEYS[3], 'max_queued', 'max_wait_s')
  local served_at, patience_ms = tonumber(redis.call('GET', KEYS[14]) or nil), tonumber(ARGV[15])
  local served = not served_at or patience_ms == 0 or now - served_at < patience_ms
  if (explain or not served) and refuses(served, 'backend_unavailable', 'unserved_ms', served_at and int(now - served_at) or '') then
    return refusal
  end
  local most_queued = math.min(limit_of(queue_limits[1]) or math.huge, tonumber(ARGV[10]))
  local longest_ms = limit_of(queue_limits[2]) and limit_of(queue_limits[2]) * 1000
  local queue = look_at_queue(KEYS[6], KEYS[13], now, tonumber(ARGV[13]), organization, ARGV[14], most_queued)
  local overflow, again_in_ms = find_overflow(queue, most_queued, longest_ms)
  if (explain or overflow) and refuses(not overflow, 'queue_full', 'why', overflow or '', 'waiting', int(queue.waiting),
    'limit', int(most_queued), 'wait_ms', queue.wait_ms and int(queue.wait_ms) or '', 'longest_ms', longest_ms and int(longest_ms) or '',
    'retry_ms', int(again_in_ms)) then return refusal end
end

-- the budgets: the whole worst case fits into each of them, or nothing is held; holds that have expired count no more
for _, scope in ipairs(scopes) do
  if scope.budgets then
    scope.expired, scope.freed = redis.call('ZRANGEBYSCORE', scope.holds, '-inf', now), 0
    for _, hold in ipairs(scope.expired) do scope.freed = scope.freed + tonumber(string.match(hold, ':(%d+)$')) end
    scope.held = math.max(scope.held - scope.freed, 0)
    for _, budget in ipairs(scope.budgets) do
      local fits = not budget.most or budget.spent + scope.held + worst <= budget.most
      if (explain or not fits) and refuses(fits, 'insufficient_quota', 'scope', scope.name, 'period', budget.period,
        'spent_nanousd', int(budget.spent), 'held_nanousd', int(scope.held), 'worst_nanousd', int(worst),
        'limit_nanousd', budget.most and int(budget.most) or '', 'ends_at_ms', budget.ends_at_ms) then return refusal end
    end
  end
end
if explain then return report end
if ARGV[11] == 'check' then return admitted() end

-- admitted: from here on it only writes
for _, scope in ipairs(scopes) do
  -- a job of the organization's was lost: then its holds go from all scopes, also from those that nobody looks at
  if #own.expired > 0 or (scope.expired and #scope.expired > 0) then redis.call('ZREMRANGEBYSCORE', scope.holds, '-inf', now) end
  redis.call('ZADD', scope.holds, ARGV[8], member)
  if scope.budgets then redis.call('HSET', scope.spend, 'held_nanousd', scope.held + worst) end
end
for _, name in ipairs({KEYS[11], KEYS[12]}) do
  if name ~= '' and not is_known then
    if #own.expired > 0 then redis.call('ZREMRANGEBYSCORE', name, '-inf', now) end
    redis.call('ZADD', name, ARGV[8], job)
  end
end
for _, w in ipairs(windows) do count(w, w.amount) end
if is_known then redis.call('XADD', KEYS[16], '*', '0', ARGV[16]) end
return admitted()
