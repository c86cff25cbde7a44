-- Calls, tables and strings.
local function fib(n) if n < 2 then return n end return fib(n - 1) + fib(n - 2) end

local list, seed = {}, 42
for i = 1, 40000 do
  seed = (seed * 1103 + 12345) % 65536
  list[i] = seed
end
table.sort(list)

local words = {}
for i = 1, 20000 do
  local word = string.format("w%d", i % 997)
  words[word] = (words[word] or 0) + 1
end

local x = 0.0
for i = 1, 1500000 do x = x + (i % 7) * 0.5 end

local result = string.format("%d %d %d %.1f", fib(26), list[20000], words.w5, x)
assert(result == "121393 32767 21 2250000.0", result)
