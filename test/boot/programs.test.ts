// Programs that make code, or that are stopped in it: JITs, ptrace, signals. What they print is what they print on the host.
import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { describe, expect, test } from 'vitest'
import { diagnose } from '../../dist/index.js'
import { accel, patience } from '../helpers/accel.js'
import { debianWith, freestandingProgram, hostNode, testProgram } from '../helpers/guests.js'
import { Shell } from '../helpers/shell.js'

const run = promisify(execFile)
const TIMEOUT = 600_000 * patience

/** Hot functions of every kind that V8 compiles, regular expressions and WebAssembly. */
const NODE = String.raw`
const { createHash } = require('node:crypto')
const say = (name, value) => console.log(name, createHash('sha256').update(JSON.stringify(value)).digest('hex').slice(0, 16))
let seed = 1
const random = () => (seed = (Math.imul(seed, 1103515245) + 12345) >>> 0)
const repeat = (n, f) => { let last; for (let i = 0; i < n; i++) last = f(i); return last }
say('integers', repeat(300000, (() => { let x = 1; return (i) => (x = (Math.imul(x, 31) ^ (x >>> 7)) + i | 0) })()))
say('doubles', repeat(300000, (() => { let x = 1; return (i) => (x = Math.sqrt(x * 1.0001 + i) + Math.sin(i & 7)) })()))
class A { constructor(v) { this.v = v } get() { return this.v } }
class B extends A { get() { return super.get() * 2 } }
class C extends A { constructor(v) { super(v); this.w = 1 } get() { return this.v + this.w } }
const shapes = Array.from({ length: 3000 }, (_, i) => new [A, B, C][i % 3](i))
say('shapes', repeat(50, () => shapes.reduce((sum, one) => sum + one.get(), 0)))
// What was compiled for integers meets doubles and strings.
const add = (a, b) => a + b
repeat(100000, (i) => add(i, i)); repeat(1000, (i) => add(i + 0.5, i)); say('deoptimized', [add(1, 2), add('x', 1), add(2 ** 31, 1)])
const text = Array.from({ length: 3000 }, () => random().toString(36)).join(' ')
say('expressions', [text.match(/[a-f]+\d{2,}/g), text.replace(/(\w)(\d)(?=\w)/g, '$2$1').length, /^(a+)+$/.test('a'.repeat(18) + 'b')])
const numbers = Array.from({ length: 20000 }, random)
say('sorted', [...numbers].sort((a, b) => a - b)); say('typed', [...Float64Array.from(numbers).sort()])
function* generate(n) { for (let i = 0; i < n; i++) yield i * i }
say('generators', [...generate(20000)].length)
say('exceptions', repeat(20000, (i) => { try { if (i % 3 === 0) throw new Error(String(i)); return i } catch (error) { return error.message } }))
say('bigint', (3n ** 2000n % (10n ** 60n)).toString()); say('closures', repeat(100000, (i) => [i, i + 1].map((x) => x * 2)[1]))
say('maps', (() => { const m = new Map(); for (let i = 0; i < 30000; i++) m.set('k' + (i % 997), (m.get('k' + (i % 997)) ?? 0) + i); return [...m] })())
say('digest', createHash('sha512').update(text).digest('hex'))
// (func (param i32) (result i32)): fibonacci, recursively.
const bytes = Uint8Array.from([0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0, 10, 30, 1, 28, 0,
  32, 0, 65, 2, 72, 4, 127, 32, 0, 5, 32, 0, 65, 1, 107, 16, 0, 32, 0, 65, 2, 107, 16, 0, 106, 11, 11])
say('wasm', new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports.f(22))
say('functions', repeat(300, (i) => new Function('x', 'let s = 0; for (let i = 0; i < 300; i++) s = s * ' + (i + 3) + ' + x | 0; return s')(i)))
console.log('done')
`

const LUA = `
local jit, bit, ffi = require('jit'), require('bit'), require('ffi')
print('jit', (jit.status()))
local function run()
  local out = {}
  local x = 1
  for i = 1, 2000000 do x = bit.bxor(bit.tobit(x * 31), i) end
  out[#out + 1] = x
  local d = 1.5
  for i = 1, 1000000 do d = math.sqrt(d * 1.25 + i) end
  out[#out + 1] = string.format('%.17g', d)
  local t = {}
  for i = 1, 20000 do t[i] = (i * 7919) % 20011 end
  table.sort(t)
  out[#out + 1] = t[100] * t[19999]
  local function fib(n) if n < 2 then return n end return fib(n - 1) + fib(n - 2) end
  out[#out + 1] = fib(24)
  local s = {}
  for i = 1, 20000 do s[#s + 1] = tostring(i):rep(2):reverse() end
  out[#out + 1] = #table.concat(s)
  local a = ffi.new('double[1000]')
  for k = 1, 200 do for i = 0, 999 do a[i] = a[i] * 0.5 + i * k end end
  out[#out + 1] = string.format('%.17g', a[999])
  local ok, what = pcall(function() local n; for i = 1, 1000 do if i == 999 then n() end end end)
  out[#out + 1] = tostring(ok)
  return table.concat(out, ' ')
end
local compiled = run()
jit.off(); jit.flush()
local interpreted = run()
print(compiled == interpreted and 'same' or ('FAIL ' .. compiled .. ' / ' .. interpreted))
print(compiled)
`

const lines = (output: string) => output.split('\n').filter(Boolean)

/** Where code runs ten times slower, these take too long. */
const inL1 = process.env['SKEP_L1'] !== undefined

describe.skipIf(inL1)('the same as on the host:', () => {
  test("Node's JIT", { timeout: TIMEOUT }, async () => {
    const guest = await debianWith('node', {
      entries: [...(await hostNode()), { path: '/script.js', type: 'file', data: NODE }],
    })
    await using shell = await Shell.boot({ cpus: 2, memory: '1G' }, { guest })
    const { output, status } = await shell.run('node /script.js 2>&1', TIMEOUT)
    const { stdout } = await run(process.execPath, ['-e', NODE])
    expect(lines(output)).toEqual(lines(stdout))
    expect(status).toBe(0)
  })

  test('ptrace: single steps and debug registers', { timeout: TIMEOUT }, async () => {
    const program = await testProgram('steps')
    const guest = await debianWith('steps', {
      entries: [{ path: '/steps', type: 'file', source: program, mode: 0o755 }],
    })
    await using shell = await Shell.boot({ cpus: 2 }, { guest })
    const { output, status } = await shell.run('/steps 2>&1', TIMEOUT)
    const { stdout } = await run(program, [])
    expect(lines(output)).toEqual(lines(stdout))
    expect(status).toBe(0)
  })

  test('a program of 32 bits, compiled for 64', { timeout: TIMEOUT }, async () => {
    const guest = await debianWith('small', {
      entries: [{ path: '/small', type: 'file', source: await freestandingProgram('small', 32), mode: 0o755 }],
    })
    await using shell = await Shell.boot({}, { guest })
    const { output, status } = await shell.run('/small', TIMEOUT)
    const { stdout } = await run(await freestandingProgram('small', 64), [])
    expect(lines(output)).toEqual(lines(stdout))
    expect(status).toBe(0)
  })

  test('a storm of signals', { timeout: TIMEOUT }, async () => {
    const program = await testProgram('storm')
    const guest = await debianWith('storm', {
      entries: [{ path: '/storm', type: 'file', source: program, mode: 0o755 }],
    })
    await using shell = await Shell.boot({ cpus: 2 }, { guest })
    const { output, status } = await shell.run('/storm 20 & /storm 20; wait', TIMEOUT)
    const { stdout } = await run(program, ['1'])
    const twice = lines(output).filter((line) => !line.startsWith('['))
    expect(twice.sort()).toEqual([...lines(stdout), ...lines(stdout)].sort())
    expect(status).toBe(0)
  })
})

test.skipIf(inL1)('LuaJIT computes what its interpreter does', { timeout: TIMEOUT }, async () => {
  const guest = await debianWith('luajit', {
    packages: ['luajit'],
    entries: [{ path: '/script.lua', type: 'file', data: LUA }],
  })
  await using shell = await Shell.boot({ cpus: 2 }, { guest })
  const output = lines(await shell.read('luajit /script.lua', TIMEOUT))
  expect(output.slice(0, 2)).toEqual(['jit\ttrue', 'same'])
})

const wide = diagnose()
  .guests.find(({ backEnd }) => backEnd === accel)
  ?.models.find(({ name }) => name === 'x86-64-v4')

// Hosts without AVX-512 give none to guests.
test.skipIf(inL1 || wide?.available !== true)(
  'AVX-512: registers across switches and signals, masked accesses, strings',
  { timeout: TIMEOUT },
  async () => {
    const program = await testProgram('wide')
    const guest = await debianWith('wide', {
      entries: [{ path: '/wide', type: 'file', source: program, mode: 0o755 }],
    })
    await using shell = await Shell.boot({ cpus: 2, cpu: 'x86-64-v4' }, { guest })
    const output = lines(await shell.read('/wide 2>&1', TIMEOUT))
    expect(output).toEqual(['registers kept', 'masked accesses suppressed', 'strings right'])
    expect(await shell.complaints()).toEqual([])
  },
)

// 200 MiB of packages.
test.skipIf(process.env['SKEP_TEST_JAVA'] === undefined)(
  'Java, everything compiled at once',
  { timeout: TIMEOUT },
  async () => {
    const guest = await debianWith('java', { packages: ['openjdk-17-jre-headless'] })
    await using shell = await Shell.boot({ cpus: 2, memory: '2G' }, { guest })
    const java = await shell.read('ls -d /usr/lib/jvm/java-17-openjdk-*/bin')
    expect(await shell.read(`${java}/java -Xcomp -version 2>&1`, TIMEOUT)).toMatch(/OpenJDK 64-Bit Server VM/)
    const store = '-keystore /tmp/store -storepass secret -alias one'
    await shell.read(`${java}/keytool -genkeypair -keyalg RSA -keysize 2048 -dname CN=one ${store}`, TIMEOUT)
    expect(await shell.read(`${java}/keytool -list -v ${store}`, TIMEOUT)).toMatch(/SHA256withRSA/)
    expect(await shell.complaints()).toEqual([])
  },
)
