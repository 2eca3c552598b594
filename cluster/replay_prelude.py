"""What every script of the replay buffer starts with: keys, fence, and the moves of a group.

Invariant: a caller whose epoch a successor has overtaken changes nothing; epoch -1 is a tool that
takes part in no succession. Time is the server's. An entry is msgpack of `place` (16 digits of
arrival number + group_id: first in first out within one priority), `score` (-priority, as text),
`version`, `size` (payload bytes), `deliveries` and `owner`. Used by `cluster.replay_scripts` alone.
"""

_PRELUDE = """
local ready, leased, consumed, entries, headers, payloads, counters, finished, dead, wake, newest =
  unpack(KEYS)
local epoch = tonumber(table.remove(ARGV, 1))
if epoch >= 0 and epoch < tonumber(redis.call('GET', newest) or 0) then
  return redis.error_reply('FENCED epoch ' .. epoch .. ' was followed by ' ..
    redis.call('GET', newest))
end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function count(name, amount) redis.call('HINCRBY', counters, name, amount) end

local function load(id)
  local packed = redis.call('HGET', entries, id)
  return packed and cmsgpack.unpack(packed)
end

local function save(id, entry) redis.call('HSET', entries, id, cmsgpack.pack(entry)) end

local function ring()
  if redis.call('EXISTS', ready) == 0 then
    redis.call('DEL', wake)
  elseif redis.call('EXISTS', wake) == 0 then
    redis.call('RPUSH', wake, 1)
  end
end

local function detach(id, entry)
  redis.call('ZREM', ready, entry.place)
  redis.call('ZREM', leased, id)
  redis.call('ZREM', consumed, id)
end

local function make_ready(id, entry)
  detach(id, entry)
  entry.owner = ''
  save(id, entry)
  redis.call('ZADD', ready, entry.score, entry.place)
end

local function forget(id, entry)
  detach(id, entry)
  redis.call('HDEL', entries, id)
  redis.call('HDEL', headers, id)
  redis.call('HDEL', payloads, id)
  count('payload_bytes', -entry.size)
  redis.call('ZADD', finished, now, id)
end

local function bury(id, entry, reason)
  redis.call('XADD', dead, 'MAXLEN', '~', 10000, '*', 'group_id', id, 'reason', reason,
    'deliveries', entry.deliveries, 'payload', redis.call('HGET', payloads, id) or '')
  forget(id, entry)
  count('dead_lettered', 1)
end

local function end_lease(id, max_deliveries)
  local entry = load(id)
  if entry.deliveries > max_deliveries then
    bury(id, entry, 'delivered ' .. entry.deliveries .. ' times')
    return 0
  end
  make_ready(id, entry)
  return 1
end
"""

GROWS = "#!lua" + _PRELUDE
SHRINKS = "#!lua flags=allow-oom" + _PRELUDE
# Called with epoch -1, so that the fence above lets a repeated call through.
SUCCEED = """
local own, last = tonumber(ARGV[1]), tonumber(redis.call('GET', newest) or 0)
if redis.call('GET', KEYS[12]) == ARGV[2] then return last end
if own >= 0 and own < last then
  return redis.error_reply('FENCED epoch ' .. own .. ' was followed by ' .. last)
end
for _, key in ipairs(KEYS) do redis.call('PERSIST', key) end
redis.call('SET', KEYS[12], ARGV[2])
redis.call('SET', newest, math.max(own, last) + 1)
return math.max(own, last) + 1
"""
