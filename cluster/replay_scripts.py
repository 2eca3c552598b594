"""The Lua scripts of the replay buffer: one script per change that touches more than one key.

Invariant: after any script a group is in exactly one of ready, leased, consumed or finished, only
the first three have an entry, header and payload, and `wake` holds one token while any is ready.
Called by `cluster.replay_buffer` alone.

KEYS[1..11] of every script are `Keys.state`, and the caller's epoch goes before the ARGV that stand
above it (see `cluster.replay_prelude`). Only ADD is refused when Redis is out of memory, so a full
server can still be drained.
"""

from enum import StrEnum

from cluster.replay_prelude import GROWS, SHRINKS, SUCCEED


class Script(StrEnum):
    """One script per member; its ARGV and what it returns stand above it."""

    # ARGV: group_id, score, version, header, payload, capacity, number of finished ids to keep.
    # Returns "added", "duplicate" or "full". Capacity is for groups that came after the last
    # RESTORE: of those before, at most `restored` are left, the fewest there have been since.
    ADD = (
        GROWS
        + """
local id, score, version, header, payload = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
redis.call('ZREMRANGEBYRANK', finished, 0, -ARGV[7] - 1)
if redis.call('HEXISTS', entries, id) == 1 or redis.call('ZSCORE', finished, id) then
  count('duplicates', 1)
  return 'duplicate'
end
local held = redis.call('ZCARD', ready) + redis.call('ZCARD', leased)
local restored = math.min(held, redis.call('HGET', counters, 'restored') or 0)
redis.call('HSET', counters, 'restored', restored)
if held >= tonumber(ARGV[6]) + restored then return 'full' end
local arrival = redis.call('HINCRBY', counters, 'added', 1)
redis.call('HSET', headers, id, header)
redis.call('HSET', payloads, id, payload)
count('payload_bytes', #payload)
make_ready(id, {place = string.format('%016d', arrival) .. id, score = score,
  version = tonumber(version), size = #payload, deliveries = 0, owner = ''})
ring()
return 'added'
"""
    )

    # KEYS[12]: the owner's last claim.
    # ARGV: owner, most groups, lease (ms), request id. The same request id gets the same groups
    # again.
    # Returns group_id, header, group_id, header, ... in priority order; a header may be nil.
    CLAIM = (
        SHRINKS
        + """
local owner, most, lease, request = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local answer = {}
local function include(id)
  answer[#answer + 1] = id
  answer[#answer + 1] = redis.call('HGET', headers, id)
end

local last = redis.call('GET', KEYS[12])
last = last and cmsgpack.unpack(last)
if last and last.request == request then
  for _, id in ipairs(last.ids) do
    local entry = redis.call('ZSCORE', leased, id) and load(id)
    if entry and entry.owner == owner then include(id) end
  end
  return answer
end

local ids = {}
while #ids < most do
  local first = redis.call('ZPOPMIN', ready)
  if #first == 0 then break end
  local id = string.sub(first[1], 17)
  local entry = load(id)
  entry.deliveries = entry.deliveries + 1
  entry.owner = owner
  save(id, entry)
  redis.call('ZADD', leased, now + lease, id)
  ids[#ids + 1] = id
  include(id)
end
if #ids > 0 then
  redis.call('SET', KEYS[12], cmsgpack.pack({request = request, ids = ids}), 'PX', lease)
end
ring()
return answer
"""
    )

    # ARGV: owner, lease (ms), group_id, ... Leases those that are ready. Returns those it then has.
    TAKE = (
        SHRINKS
        + """
local taken = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local entry = load(id)
  if entry and redis.call('ZREM', ready, entry.place) == 1 then
    entry.deliveries = entry.deliveries + 1
    entry.owner = ARGV[1]
    save(id, entry)
    redis.call('ZADD', leased, now + ARGV[2], id)
  end
  if entry and entry.owner == ARGV[1] then taken[#taken + 1] = id end
end
ring()
return taken
"""
    )

    # ARGV: owner, group_id, header, payload, score. Returns 1, or 0 where the owner has no lease.
    REPLACE = (
        SHRINKS
        + """
local id = ARGV[2]
local entry = redis.call('ZSCORE', leased, id) and load(id)
if not entry or entry.owner ~= ARGV[1] then return 0 end
redis.call('HSET', headers, id, ARGV[3])
redis.call('HSET', payloads, id, ARGV[4])
count('payload_bytes', #ARGV[4] - entry.size)
entry.size = #ARGV[4]
entry.score = ARGV[5]
save(id, entry)
return 1
"""
    )

    # ARGV: owner, lease (ms), group_id, ... Returns the number of leases renewed.
    RENEW = (
        SHRINKS
        + """
local renewed = 0
for i = 3, #ARGV do
  local entry = redis.call('ZSCORE', leased, ARGV[i]) and load(ARGV[i])
  if entry and entry.owner == ARGV[1] then
    redis.call('ZADD', leased, now + ARGV[2], ARGV[i])
    renewed = renewed + 1
  end
end
return renewed
"""
    )

    # ARGV: owner, group_id, ... Gives leases of this owner back; such a delivery does not count.
    # Returns the number of groups made ready.
    RELEASE = (
        SHRINKS
        + """
local released = 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local entry = redis.call('ZSCORE', leased, id) and load(id)
  if entry and entry.owner == ARGV[1] then
    entry.deliveries = entry.deliveries - 1
    make_ready(id, entry)
    released = released + 1
  end
end
ring()
return released
"""
    )

    # ARGV: step, group_id, ... All or nothing; repeating it with the same step changes nothing.
    # Returns group_id, reason, ... of those that stand in the way, or an empty list.
    CONSUME = (
        SHRINKS
        + """
local conflicts, entering = {}, {}
for i = 2, #ARGV do
  local id = ARGV[i]
  local step = redis.call('ZSCORE', consumed, id)
  local entry = load(id)
  if not entry or (step and tonumber(step) ~= tonumber(ARGV[1])) then
    conflicts[#conflicts + 1] = id
    conflicts[#conflicts + 1] = step and 'consumed by step ' .. step or 'not in the buffer'
  elseif not step then
    entering[id] = entry
  end
end
if #conflicts > 0 then return conflicts end
for id, entry in pairs(entering) do
  detach(id, entry)
  entry.owner = ''
  entry.deliveries = 0
  save(id, entry)
  redis.call('ZADD', consumed, ARGV[1], id)
end
ring()
return conflicts
"""
    )

    # ARGV: durable step, batch size. Returns the number deleted; fewer than a batch means done.
    ACKNOWLEDGE = (
        SHRINKS
        + """
local ids = redis.call('ZRANGEBYSCORE', consumed, '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do forget(id, load(id)) end
count('acknowledged', #ids)
return #ids
"""
    )

    # ARGV: durable step, most deliveries, batch size.
    # Returns groups looked at, groups made ready; none looked at means done.
    RESTORE = (
        SHRINKS
        + """
local seen, returned = 0, 0
local undone = redis.call('ZRANGEBYSCORE', consumed, '(' .. ARGV[1], '+inf', 'LIMIT', 0, ARGV[3])
for _, id in ipairs(undone) do
  make_ready(id, load(id))
  seen, returned = seen + 1, returned + 1
end
for _, id in ipairs(redis.call('ZRANGE', leased, 0, ARGV[3] - 1)) do
  seen, returned = seen + 1, returned + end_lease(id, tonumber(ARGV[2]))
end
redis.call('HSET', counters, 'restored', redis.call('ZCARD', ready))
ring()
return {seen, returned}
"""
    )

    # ARGV: most deliveries, batch size. Returns as RESTORE.
    EXPIRE = (
        SHRINKS
        + """
local returned = 0
local ids = redis.call('ZRANGEBYSCORE', leased, '-inf', now, 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do returned = returned + end_lease(id, tonumber(ARGV[1])) end
ring()
return {#ids, returned}
"""
    )

    # ARGV: group_id, reason, owner or "" for anybody. Returns "dropped", "unknown" (nothing to do),
    # or refuses: "not held" (the owner has no lease), "consumed".
    DROP = (
        SHRINKS
        + """
local entry = load(ARGV[1])
if not entry then return 'unknown' end
if ARGV[3] ~= '' and entry.owner ~= ARGV[3] then return 'not held' end
if redis.call('ZSCORE', consumed, ARGV[1]) then return 'consumed' end
forget(ARGV[1], entry)
count('dropped:' .. ARGV[2], 1)
ring()
return 'dropped'
"""
    )

    # ARGV: group_id, reason, ... Unknown ids are left out. Returns the number moved.
    BURY = (
        SHRINKS
        + """
local buried = 0
for i = 1, #ARGV, 2 do
  local entry = load(ARGV[i])
  if entry then
    bury(ARGV[i], entry, ARGV[i + 1])
    buried = buried + 1
  end
end
ring()
return buried
"""
    )

    # KEYS[12]: the call that took over last.
    # ARGV: the caller's epoch, -1 for a newcomer; call id. The same call id gets the same epoch.
    # Returns the new epoch. Refuses one that was overtaken.
    TAKE_OVER = SHRINKS + SUCCEED

    # ARGV: group_id, ... Ids that left and may be added again.
    READMIT = SHRINKS + "for _, id in ipairs(ARGV) do redis.call('ZREM', finished, id) end"

    # ARGV: highest version. Ready groups of newer weights go, and may be added again. Returns ids.
    DISCARD = (
        SHRINKS
        + """
local lost = {}
for _, place in ipairs(redis.call('ZRANGE', ready, 0, -1)) do
  local id = string.sub(place, 17)
  local entry = load(id)
  if entry.version > tonumber(ARGV[1]) then
    forget(id, entry)
    redis.call('ZREM', finished, id)
    count('dropped:lost_weights', 1)
    lost[#lost + 1] = id
  end
end
ring()
return lost
"""
    )
