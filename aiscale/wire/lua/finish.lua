-- End a job exactly once: the event reaches settlement, the waiting web process and the job's log together. Uses queue.lua.
--
-- KEYS  1 job record (hash)  2 leases (zset)  3 finished (stream)  4 reply stream  5 job log (stream)  6 queued jobs of the model (zset)
--       7 queue state (hash)
-- ARGV  1 job id  2 who ends it: worker id, '' for the reaper, 'queue' for who takes it out of the queue  3 now (epoch ms)
--       4 encoded Finished  5 keep log (0|1)  6 reply stream max length  7 reply stream TTL (s)  8 job log TTL (s)
--       9 record TTL after the end (s)  10 tokens that were computed  11 web process that must deliver the answer ('' = none must)
-- Returns 1 when this call ended the job, 0 when it had ended, or is not this worker's any more (then nothing is written);
--   the reaper gets 0 too when the lease lives again, and 'queue' when a worker has claimed the job.
-- Example: EVAL ... aiscale:job:j1 aiscale:leases aiscale:finished aiscale:replies:p aiscale:joblog:j1 aiscale:queued:m aiscale:queue:m
--          j1 w1 1700000000000 <bytes> 1 50000 120 3600 600 17 ''  -> 1
-- Atomic: all streams or none. It is in flight no more, and its organization gets the virtual time back that it did not use. What must be
-- delivered says so in the finished stream: `p`, the process, and `r`, the entry that it must have read (see apps/spend/receipts.py).
local record = redis.call('HMGET', KEYS[1], 'state', 'worker', 'tier', 'organization', 'tokens', 'weight', 'in_flight', 'beside')
if not record[1] or record[1] == 'done' then return 0 end
if ARGV[2] == '' then
  local lease = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if lease and tonumber(lease) > tonumber(ARGV[3]) then return 0 end
elseif ARGV[2] == 'queue' then
  if record[1] ~= 'queued' then return 0 end
elseif record[2] ~= ARGV[2] then
  return 0
end
local reply = redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[6], '*', '0', ARGV[4])
if ARGV[11] == '' then
  redis.call('XADD', KEYS[3], '*', '0', ARGV[4])
else
  redis.call('XADD', KEYS[3], '*', '0', ARGV[4], 'p', ARGV[11], 'r', reply)
end
redis.call('EXPIRE', KEYS[4], ARGV[7])
if ARGV[5] == '1' then
  redis.call('XADD', KEYS[5], '*', '0', ARGV[4])
  redis.call('EXPIRE', KEYS[5], ARGV[8])
end
redis.call('HSET', KEYS[1], 'state', 'done')
redis.call('HDEL', KEYS[1], 'payload')
redis.call('EXPIRE', KEYS[1], ARGV[9])
redis.call('ZREM', KEYS[2], ARGV[1])
for name in string.gmatch(record[7] or '', '%S+') do redis.call('ZREM', name, ARGV[1]) end
if record[1] == 'queued' then
  leave(KEYS[7], KEYS[6], ARGV[1], record[3], record[4], record[5])
else
  give_back(KEYS[7], record[3], record[4], length_of(number(record[5]) - number(ARGV[10]), record[6]))
  if ARGV[2] ~= '' then measure(KEYS[7], tonumber(ARGV[3]), ARGV[1], number(record[5]), record[8])
  else redis.call('ZREM', KEYS[7] .. ':running', ARGV[1]) end
end
return 1
