-- Share what the scripts of the queue do to a model's lanes. Not run by itself: aiscale.wire.scripts puts it in front of each script
-- that says "Uses queue.lua".
--
-- KEYS, ARGV  none of its own. `q` is keys.queue_state(model), a hash, and the beginning of the names below it, for each tier:
--   q:<tier>:jobs (zset)         waiting job -> epoch ms at which it was queued first
--   q:<tier>:turns (zset)        organization with waiting jobs -> the virtual time at which its next job starts
--   q:<tier>:tags (zset)         organization -> the virtual time at which its last job ends, while that lies ahead
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
local RATE_MEMORY_MS = 30000
local BACKLOG_FROM_MS = 250

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

-- Remember how fast the model works while jobs wait for it: `rate_tokens` in `rate_ms`, older ones fading.
local function measure(q, now, tokens)
  local stored = redis.call('HMGET', q, 'backlog_at_ms', 'rate_at_ms', 'rate_tokens', 'rate_ms')
  redis.call('HSET', q, 'rate_at_ms', now)
  local backlog_at = stored[1] and tonumber(stored[1]) or math.huge
  -- a job that waits for its ticket alone is no backlog
  if now - backlog_at < BACKLOG_FROM_MS then return end
  local passed = math.max(now - math.max(number(stored[2]), backlog_at), 0)
  local fading = math.exp(-passed / RATE_MEMORY_MS)
  redis.call('HSET', q, 'rate_tokens', number(stored[3]) * fading + tokens, 'rate_ms', number(stored[4]) * fading + passed)
end
