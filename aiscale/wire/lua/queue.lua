-- Share what the scripts of the queue do to a model's lanes. Not run by itself: aiscale.wire.scripts puts it in front of each script
-- that says "Uses queue.lua".
--
-- KEYS, ARGV  none of its own. `q` is keys.queue_state(model), a hash, and the beginning of the names below it:
--   q:<tier>:jobs (zset)         waiting job -> epoch ms at which it was queued first
--   q:<tier>:turns (zset)        organization with waiting jobs -> the virtual time at which its next job starts
--   q:<tier>:tags (zset)         organization -> the virtual time at which its last job ends, while that lies ahead
--   q:running (zset)             job that a worker has -> epoch ms at which it took it
--   q:<tier>:lane:<org> (zset)   the organization's waiting jobs -> their place, first come first served
-- Returns  what each function says.
-- Example  a (weight 1) has two jobs of 100 tokens and b one of 30; all wait: a's first starts at 0 and its second at 100, b's at 0. So the
--          order is a, b, a: what a sends changes nothing for b.
-- Atomic   with the script that it is part of.
--
-- Between tiers the oldest waiting job decides: its tier's number times AGING_MS later than it came. A tier is strictly ahead of those
-- below it, until somebody there has waited so much longer; so nobody starves. Within a tier it is start-time fair queueing: virtual
-- time is tokens by weight, an organization's jobs start one after the other's end in virtual time, and the earliest start is next. An
-- organization that was away does not save up time, and one that used a free machine alone owes nothing.
local TIERS = {0, 3, 6, 9, 12}
local AGING_MS = 10000
local CALL_AGAIN_MS = 1000
local RATE_FADING = 1 - 1 / 64
local BACKLOG_FROM_MS = 250
local UNKNOWN_RETRY_MS = 5000

local function number(value) return tonumber(value or 0) or 0 end

-- Return how far a job moves its organization on in virtual time.
local function length_of(tokens, weight) return number(tokens) / math.max(number(weight), 1) end

-- Send a ticket for the model, unless somebody will look before `call_after_ms`: a ticket is on its way, or a worker comes back.
local function call(q, broker, now, ticket)
  if now < number(redis.call('HGET', q, 'call_after_ms')) then return 0 end
  redis.call('LPUSH', broker, ticket)
  redis.call('HSET', q, 'call_after_ms', now + CALL_AGAIN_MS)
  return 1
end

-- Put a job into its organization's lane.
local function join(q, depth, job, place, now)
  local base = q .. ':' .. place.tier
  local lane = base .. ':lane:' .. place.organization
  if redis.call('ZADD', lane, place.seq, job) == 0 then return end
  if redis.call('ZCARD', lane) == 1 then
    local start = math.max(number(redis.call('HGET', q, 'time:' .. place.tier)),
      number(redis.call('ZSCORE', base .. ':tags', place.organization)))
    redis.call('ZADD', base .. ':turns', start, place.organization)
  end
  redis.call('ZADD', base .. ':jobs', place.queued_at_ms, job)
  redis.call('HINCRBY', q, 'tokens:' .. place.tier, place.tokens)
  redis.call('HINCRBY', q, 'tokens:' .. place.tier .. ':' .. place.organization, place.tokens)
  redis.call('ZADD', depth, place.deadline_ms, job)
  redis.call('HSETNX', q, 'backlog_at_ms', now)
end

local function take_off(q, field, tokens)
  if redis.call('HINCRBY', q, field, -number(tokens)) <= 0 then redis.call('HDEL', q, field) end
end

-- Take a job out of its lane. Idempotent.
local function leave(q, depth, job, tier, organization, tokens)
  local base = q .. ':' .. tier
  local lane = base .. ':lane:' .. organization
  if redis.call('ZREM', lane, job) == 0 then return end
  redis.call('ZREM', base .. ':jobs', job)
  take_off(q, 'tokens:' .. tier, tokens)
  if redis.call('EXISTS', lane) == 1 then
    take_off(q, 'tokens:' .. tier .. ':' .. organization, tokens)
  else
    redis.call('HDEL', q, 'tokens:' .. tier .. ':' .. organization)
    redis.call('ZREM', base .. ':turns', organization)
  end
  if redis.call('EXISTS', base .. ':turns') == 0 then
    -- nobody waits: who used the free machine until now owes nothing to those who come next
    local last = redis.call('ZRANGE', base .. ':tags', -1, -1, 'WITHSCORES')
    if last[2] then redis.call('HSET', q, 'time:' .. tier, last[2]) end
    redis.call('DEL', base .. ':tags')
    redis.call('HDEL', q, 'tokens:' .. tier)
  end
  redis.call('ZREM', depth, job)
  if redis.call('EXISTS', depth) == 0 then redis.call('HDEL', q, 'backlog_at_ms', 'call_after_ms') end
end

-- Return the tier whose turn it is, or nil.
local function urgent_tier(q)
  local best, least
  for _, tier in ipairs(TIERS) do
    local oldest = redis.call('ZRANGE', q .. ':' .. tier .. ':jobs', 0, 0, 'WITHSCORES')
    if oldest[2] then
      local urgency = tier * AGING_MS + tonumber(oldest[2])
      if not least or urgency < least then best, least = tier, urgency end
    end
  end
  return best
end

-- Charge an organization's virtual time for the job that is served now; its next job starts where this one ends.
local function serve(q, tier, organization, start, length)
  local base = q .. ':' .. tier
  local time = math.max(number(redis.call('HGET', q, 'time:' .. tier)), start)
  redis.call('HSET', q, 'time:' .. tier, time)
  redis.call('ZADD', base .. ':tags', start + length, organization)
  if redis.call('ZSCORE', base .. ':turns', organization) then
    redis.call('ZADD', base .. ':turns', start + length, organization)
  end
  redis.call('ZREMRANGEBYSCORE', base .. ':tags', '-inf', time)
end

-- Give virtual time back that a job did not use.
local function give_back(q, tier, organization, length)
  if length <= 0 then return end
  local base = q .. ':' .. tier
  local tag = redis.call('ZSCORE', base .. ':tags', organization)
  if not tag then return end
  local time = number(redis.call('HGET', q, 'time:' .. tier))
  tag = tonumber(tag) - length
  if redis.call('ZSCORE', base .. ':turns', organization) then
    redis.call('ZADD', base .. ':turns', math.max(tag, time), organization)
  end
  if tag > time then redis.call('ZADD', base .. ':tags', tag, organization)
  else redis.call('ZREM', base .. ':tags', organization) end
end

-- Say who is ahead of a job that would join now, and how long it would wait: `waiting` jobs of its tier and of those above, `own`
-- of its organization among them, which has a `share` of `limit`; `wait_ms`, nil while the model's pace is not known.
local function look_at_queue(q, depth, now, tier, organization, weight, limit)
  local base = q .. ':' .. tier
  local seen = {waiting = 0, own = redis.call('ZCARD', base .. ':lane:' .. organization)}
  local ahead, all_tokens = 0, 0
  for _, other in ipairs(TIERS) do
    local waiting_tokens = number(redis.call('HGET', q, 'tokens:' .. other))
    all_tokens = all_tokens + waiting_tokens
    if other <= tier then seen.waiting = seen.waiting + redis.call('ZCARD', q .. ':' .. other .. ':jobs') end
    if other < tier then ahead = ahead + waiting_tokens end
  end
  local all = redis.call('ZCARD', depth)
  local lanes = redis.call('ZCARD', base .. ':turns') + (seen.own == 0 and 1 or 0)
  seen.share = math.max(math.floor(limit / lanes), 1)
  if all == 0 then
    seen.wait_ms = 0
    return seen
  end
  local mean = all_tokens / all
  -- others of the tier are served until they have had as much as this organization will have had
  local own = number(redis.call('HGET', q, 'tokens:' .. tier .. ':' .. organization))
  local time = number(redis.call('HGET', q, 'time:' .. tier))
  local start = math.max(time, number(redis.call('ZSCORE', base .. ':tags', organization)),
    number(redis.call('ZSCORE', base .. ':turns', organization))) + length_of(own, weight)
  local before = redis.call('ZCOUNT', base .. ':turns', '-inf', start) - (seen.own > 0 and 1 or 0)
  local others = number(redis.call('HGET', q, 'tokens:' .. tier)) - own
  ahead = ahead + own + math.min(others, before * (start - time + mean))
  local pace = redis.call('HMGET', q, 'rate_tokens', 'rate_ms', 'rate_ends', 'rate_at_ms', 'backlog_at_ms')
  if not pace[1] then return seen end
  local rate = tonumber(pace[1]) / tonumber(pace[2])
  -- a model of which nothing was heard for longer than a job takes is slower by now
  local silent_ms = now - math.max(number(pace[4]), number(pace[5]))
  rate = rate * math.min(tonumber(pace[2]) / tonumber(pace[3]) / math.max(silent_ms, 1), 1)
  seen.wait_ms = (ahead + mean) / rate
  seen.job_ms = mean / rate
  seen.lanes = lanes
  return seen
end

-- Return whether there is no room for one more, why, and when there is expected to be some. Past `limit` an organization may still have
-- its share waiting, so that those who fill the queue do not keep others out; nobody past twice the limit.
local function find_overflow(seen, limit, longest_ms)
  local full = seen.waiting >= 2 * limit or (seen.waiting >= limit and seen.own >= seen.share)
  if full then
    local retry_ms = UNKNOWN_RETRY_MS
    if seen.job_ms then
      retry_ms = (seen.waiting - limit + 1) * seen.job_ms
      if seen.waiting < 2 * limit then retry_ms = math.min(retry_ms, (seen.own - seen.share + 1) * seen.lanes * seen.job_ms) end
    end
    return 'depth', retry_ms
  end
  if longest_ms and seen.wait_ms and seen.wait_ms > longest_ms then return 'wait', seen.wait_ms - longest_ms end
  return nil, 0
end

-- Remember how fast the model works while jobs wait for it, by Little's law: so many jobs at once (`rate_tokens` is their sum of tokens
-- times jobs at once), each in so much time (`rate_ms`), over the last `rate_ends` ends, older ones fading.
local function measure(q, now, job, tokens, beside)
  local running = q .. ':running'
  local began, at_once = redis.call('ZSCORE', running, job), redis.call('ZCARD', running)
  redis.call('ZREM', running, job)
  local stored = redis.call('HMGET', q, 'backlog_at_ms', 'rate_tokens', 'rate_ms', 'rate_ends')
  redis.call('HSET', q, 'rate_at_ms', now)
  -- a job that waits for its ticket alone is no backlog
  if not began or not stored[1] or now - tonumber(stored[1]) < BACKLOG_FROM_MS then return end
  -- those that began together end together: the first sees all at its end, the last saw all when it began
  redis.call('HSET', q, 'rate_tokens', number(stored[2]) * RATE_FADING + tokens * math.max(at_once, number(beside)),
    'rate_ms', number(stored[3]) * RATE_FADING + math.max(now - tonumber(began), 1),
    'rate_ends', number(stored[4]) * RATE_FADING + 1)
end
