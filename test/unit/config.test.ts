import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { cpuFeatures, cpuModels, parseCpu } from '../../ts/src/config/cpu.js'
import { loadConfig } from '../../ts/src/config/load.js'
import { configOptions, unsupportedOptions } from '../../ts/src/config/options.js'
import { defineVm, resolve } from '../../ts/src/config/resolve.js'
import { configJsonSchema, vmConfigSchema } from '../../ts/src/config/schema.js'
import { distance, nearest } from '../../ts/src/config/suggest.js'
import type { HugePages, VmConfig } from '../../ts/src/config/types.js'
import { validate } from '../../ts/src/config/validate.js'
import type { Diagnosis } from '../../ts/src/doctor.js'
import { ConfigError, HostError } from '../../ts/src/errors.js'

const boot = { kernel: '/k' }

function refusal(value: unknown): ConfigError {
  try {
    resolve(value as VmConfig)
  } catch (error) {
    expect(error).toBeInstanceOf(ConfigError)
    return error as ConfigError
  }
  throw new Error(`accepted: ${JSON.stringify(value)}`)
}

/** A host on which `auto` is that. */
function host(auto: 'software' | 'kvm', kvm: Partial<Diagnosis['kvm']> = {}): Diagnosis {
  return {
    cpu: { vendor: 'AuthenticAMD', model: 'x', features: { svm: true } },
    kvm: { present: true, openable: true, paravirtual: false, usable: true, ...kvm },
    guests: [],
    accelerator: { auto, reason: 'x' },
    engine: { auto: 'jit', reason: 'x' },
    host: { kernel: '6.1', cpus: 1, memoryBytes: 2 ** 30 },
    limits: {},
  }
}

describe('what is refused', () => {
  const lpc = (com1: unknown) => ({ boot, devices: { '0:31:0': { type: 'lpc', com1 } } })
  const slot = (name: string, type: string) => ({ boot, devices: { [name]: { type } } })

  test.each<[unknown, string, string, RegExp]>([
    // processors
    [{ boot, cpus: 0 }, 'ERR_CONFIG_CPUS', 'cpus', /1 to 64.*got 0$/],
    [{ boot, cpus: 1.5 }, 'ERR_CONFIG_CPUS', 'cpus', /whole number.*got 1\.5$/],
    [{ boot, cpus: 4096 }, 'ERR_CONFIG_CPUS', 'cpus', /1 to 64.*got 4096$/],
    [{ boot, cpus: -1 }, 'ERR_CONFIG_CPUS', 'cpus', /got -1$/],
    [{ boot, cpus: Number.NaN }, 'ERR_CONFIG_CPUS', 'cpus', /got NaN$/],
    [{ boot, cpus: '2' }, 'ERR_CONFIG_CPUS', 'cpus', /got "2"$/],
    [{ boot, cpus: { sockets: 8, cores: 8, threads: 2 } }, 'ERR_CONFIG_CPUS', 'cpus', /product/],
    [{ boot, cpus: { cores: 0 } }, 'ERR_CONFIG_CPUS', 'cpus.cores', /got 0$/],
    [{ boot, cpus: { core: 2 } }, 'ERR_CONFIG_UNKNOWN', 'cpus.core', /did you mean "cores"\?$/],
    // the processor they are
    [{ boot, cpu: 'x86-64-v5' }, 'ERR_CONFIG_CPU', 'cpu', /expected host, .* or x86-64-v4, .*got "x86-64-v5"$/],
    [{ boot, cpu: 5 }, 'ERR_CONFIG_CPU', 'cpu', /got 5$/],
    [{ boot, cpu: { model: 'epyc' } }, 'ERR_CONFIG_CPU', 'cpu.model', /expected host, .*got "epyc"$/],
    [{ boot, cpu: { models: 'host' } }, 'ERR_CONFIG_UNKNOWN', 'cpu.models', /did you mean "model"\?$/],
    [{ boot, cpu: { features: ['aes'] } }, 'ERR_CONFIG_CPU', 'cpu.features', /got an array$/],
    [{ boot, cpu: { features: { aes: 'on' } } }, 'ERR_CONFIG_CPU', 'cpu.features.aes', /true or false, got "on"$/],
    [
      { boot, cpu: { features: { avx52: true } } },
      'ERR_CONFIG_UNKNOWN',
      'cpu.features.avx52',
      /^unknown option "cpu\.features\.avx52"; did you mean "avx2"\?$/,
    ],
    [{ boot, cpu: { features: { ht: false } } }, 'ERR_CONFIG_CPU', 'cpu.features.ht', /follows from cpus$/],
    // memory
    [{ boot, memory: '1M' }, 'ERR_CONFIG_MEMORY', 'memory', /from 2M to 16T.*got "1M"$/],
    [{ boot, memory: 2 ** 20 }, 'ERR_CONFIG_MEMORY', 'memory', /got 1048576$/],
    [{ boot, memory: '100T' }, 'ERR_CONFIG_MEMORY', 'memory', /got "100T"$/],
    [{ boot, memory: 'banana' }, 'ERR_CONFIG_MEMORY', 'memory', /such as 512M.*got "banana"$/],
    [{ boot, memory: '512' }, 'ERR_CONFIG_MEMORY', 'memory', /got "512"$/],
    [{ boot, memory: '2049K' }, 'ERR_CONFIG_MEMORY', 'memory', /whole MiB/],
    [{ boot, memory: 0 }, 'ERR_CONFIG_MEMORY', 'memory', /got 0$/],
    [{ boot, memory: null }, 'ERR_CONFIG_MEMORY', 'memory', /got null$/],
    [{ boot, memory: { size: 'banana' } }, 'ERR_CONFIG_MEMORY', 'memory.size', /got "banana"$/],
    [{ boot, memory: { wired: 'yes' } }, 'ERR_CONFIG_MEMORY', 'memory.wired', /expected true or false, got "yes"$/],
    [{ boot, memory: { hugePages: true } }, 'ERR_CONFIG_MEMORY', 'memory.hugePages', /"thp", "2M" or "1G", got true$/],
    [{ boot, memory: { hugePages: '4M' } }, 'ERR_CONFIG_MEMORY', 'memory.hugePages', /got "4M"$/],
    [{ boot, memory: { hugepages: '2M' } }, 'ERR_CONFIG_UNKNOWN', 'memory.hugepages', /did you mean "hugePages"\?$/],
    // where processors run
    [
      { boot, cpus: { pin: { 1: 0 } } },
      'ERR_CONFIG_CPUS',
      'cpus.pin.1',
      /no processor 1 to pin.* has 1, numbered from 0$/,
    ],
    [{ boot, cpus: { cores: 2, pin: { 64: [0] } } }, 'ERR_CONFIG_CPUS', 'cpus.pin.64', /no processor 64/],
    [{ boot, cpus: { pin: { 0: 8192 } } }, 'ERR_CONFIG_CPUS', 'cpus.pin.0', /host CPUs \(0 to 8191\).*got 8192$/],
    [{ boot, cpus: { pin: { 0: [] } } }, 'ERR_CONFIG_CPUS', 'cpus.pin.0', /got an array$/],
    [{ boot, cpus: { pin: { 0: [0, '1'] } } }, 'ERR_CONFIG_CPUS', 'cpus.pin.0[1]', /got "1"$/],
    [{ boot, cpus: { pin: { 0: -1 } } }, 'ERR_CONFIG_CPUS', 'cpus.pin.0', /got -1$/],
    [{ boot, cpus: { pin: { all: 0 } } }, 'ERR_CONFIG_CPUS', 'cpus.pin.all', /host CPUs .* by processor/],
    [{ boot, cpus: { pin: { '00': 0 } } }, 'ERR_CONFIG_CPUS', 'cpus.pin.00', /by processor/],
    [{ boot, cpus: { pin: [0, 1] } }, 'ERR_CONFIG_CPUS', 'cpus.pin', /got an array$/],
    // what leaves the guest
    [{ boot, exits: { hlt: 1 } }, 'ERR_CONFIG_INVALID', 'exits.hlt', /true or false, got 1$/],
    [{ boot, exits: { haltPoll: 1.5 } }, 'ERR_CONFIG_INVALID', 'exits.haltPoll', /nanoseconds from 0 to .*got 1\.5$/],
    [{ boot, exits: { haltPoll: 1e9 + 1 } }, 'ERR_CONFIG_INVALID', 'exits.haltPoll', /got 1000000001$/],
    [{ boot, exits: { halt: true } }, 'ERR_CONFIG_UNKNOWN', 'exits.halt', /did you mean "hlt"\?$/],
    [{ boot, exits: false }, 'ERR_CONFIG_INVALID', 'exits', /\{ hlt, pause, haltPoll \}, got false$/],
    // the engine
    [{ boot, accel: 'kvm', engine: 'interpreter' }, 'ERR_CONFIG_ENGINE', 'engine', /about the software CPU/],
    [{ boot, accel: 'kvm', engine: 'lockstep', cpus: 2 }, 'ERR_CONFIG_ENGINE', 'engine', /leave one of them out$/],
    [{ boot, engine: 'tcg' }, 'ERR_CONFIG_ENGINE', 'engine', /"auto", "jit", .* or "lockstep", got "tcg"$/],
    [
      { boot, engine: 'lockstep', cpus: { cores: 2, threads: 2 } },
      'ERR_CONFIG_ENGINE',
      'engine',
      /^engine: "lockstep" runs one processor, and cpus makes 4; give cpus 1, or engine "jit"$/,
    ],
    // names of options
    [{ boot, memroy: '1G' }, 'ERR_CONFIG_UNKNOWN', 'memroy', /^unknown option "memroy"; did you mean "memory"\?$/],
    [{ boot, zzz: 1 }, 'ERR_CONFIG_UNKNOWN', 'zzz', /^unknown option "zzz"$/],
    [{ boot: { kernl: '/k' } }, 'ERR_CONFIG_UNKNOWN', 'boot.kernl', /did you mean "kernel"\?$/],
    [{ boot, disks: [] }, 'ERR_CONFIG_UNSUPPORTED', 'disks', /no disks yet/],
    [{ boot, nics: [{}] }, 'ERR_CONFIG_UNSUPPORTED', 'nics', /no networks yet/],
    [JSON.parse('{"boot":{"kernel":"/k"},"__proto__":{"x":1}}'), 'ERR_CONFIG_UNKNOWN', '__proto__', /unknown option/],
    // what is booted
    [{}, 'ERR_CONFIG_MISSING', 'boot', /^boot is missing; expected \{ kernel \} or \{ rom \}$/],
    [{ boot: {} }, 'ERR_CONFIG_MISSING', 'boot.kernel', /is missing/],
    [{ boot: { kernel: '/k', rom: '/r' } }, 'ERR_CONFIG_INVALID', 'boot.rom', /either kernel or rom/],
    [{ boot: { kernel: '' } }, 'ERR_CONFIG_INVALID', 'boot.kernel', /expected a path/],
    [{ boot: { kernel: 'a\0b' } }, 'ERR_CONFIG_INVALID', 'boot.kernel', /expected a path/],
    [{ boot: { kernel: 5 } }, 'ERR_CONFIG_INVALID', 'boot.kernel', /expected a path, got 5$/],
    [{ boot: 'vmlinuz' }, 'ERR_CONFIG_INVALID', 'boot', /expected \{ kernel \}.*got "vmlinuz"$/],
    [{ boot: { kernel: '/k', cmdline: 'x'.repeat(70_000) } }, 'ERR_CONFIG_INVALID', 'boot.cmdline', /65536 bytes/],
    [
      { boot: { kernel: '/k', modules: [{ path: '/m' }, { cmdline: 'x' }] } },
      'ERR_CONFIG_MISSING',
      'boot.modules[1].path',
      /missing/,
    ],
    [
      { boot: { kernel: '/k', modules: Array(65).fill({ path: '/m' }) } },
      'ERR_CONFIG_INVALID',
      'boot.modules',
      /at most 64/,
    ],
    [{ boot: { rom: '/r', initrd: '/i' } }, 'ERR_CONFIG_UNKNOWN', 'boot.initrd', /unknown option "boot.initrd"/],
    // devices
    [slot('0:6:0', 'virtio-rnd'), 'ERR_CONFIG_UNSUPPORTED', 'devices["0:6:0"]', /no virtio-rnd yet/],
    [slot('0:3:0', 'lpc'), 'ERR_CONFIG_SLOT', 'devices["0:3:0"]', /sits in slot "0:31:0"/],
    [slot('31', 'lpc'), 'ERR_CONFIG_SLOT', 'devices.31', /in full, "0:31:0"/],
    [slot('banana', 'lpc'), 'ERR_CONFIG_SLOT', 'devices.banana', /not a slot/],
    [slot('0:32:0', 'nvme'), 'ERR_CONFIG_SLOT', 'devices["0:32:0"]', /not a slot/],
    [slot('0:31:0', 'nvme'), 'ERR_CONFIG_UNSUPPORTED', 'devices["0:31:0"].type', /no nvme yet/],
    [{ boot, devices: { '0:31:0': {} } }, 'ERR_CONFIG_MISSING', 'devices["0:31:0"].type', /missing/],
    [{ boot, devices: [] }, 'ERR_CONFIG_SLOT', 'devices', /got an array$/],
    [lpc('banana'), 'ERR_CONFIG_SERIAL', 'devices["0:31:0"].com1', /file:PATH.*got "banana"$/],
    [lpc('file:'), 'ERR_CONFIG_SERIAL', 'devices["0:31:0"].com1', /file:PATH/],
    [lpc({ kind: 'tcp' }), 'ERR_CONFIG_SERIAL', 'devices["0:31:0"].com1.kind', /"console", "file" or "none"/],
    [lpc({ kind: 'file' }), 'ERR_CONFIG_MISSING', 'devices["0:31:0"].com1.path', /missing/],
    [
      { boot, devices: { '0:31:0': { type: 'lpc', com1: 'file:/x/a', com2: 'file:/x/./a' } } },
      'ERR_CONFIG_SERIAL',
      'devices["0:31:0"].com2',
      /both write to \/x\/a$/,
    ],
    [
      { boot, devices: { '0:31:0': { type: 'lpc', com1: 'stdio', com3: 'stdio' } } },
      'ERR_CONFIG_SERIAL',
      'devices["0:31:0"].com3',
      /both ask for stdio/,
    ],
    // the rest
    [{ boot, name: '' }, 'ERR_CONFIG_INVALID', 'name', /1 to 255 bytes/],
    [{ boot, name: 'a\nb' }, 'ERR_CONFIG_INVALID', 'name', /control characters/],
    [{ boot, name: 'ä'.repeat(128) }, 'ERR_CONFIG_INVALID', 'name', /255 bytes/],
    [{ boot, uuid: 'x' }, 'ERR_CONFIG_INVALID', 'uuid', /a UUID such as/],
    [{ boot, accel: 'tcg' }, 'ERR_CONFIG_INVALID', 'accel', /"auto", "software" or "kvm", got "tcg"$/],
    [{ boot, version: 2 }, 'ERR_CONFIG_VERSION', 'version', /expected 1, got 2$/],
    [{ boot, debugExit: 'yes' }, 'ERR_CONFIG_INVALID', 'debugExit', /true or false/],
    [{ boot, rtc: 'mars' }, 'ERR_CONFIG_INVALID', 'rtc', /"utc" or "localtime"/],
    [{ boot, onReboot: () => 1 }, 'ERR_CONFIG_INVALID', 'onReboot', /got a function$/],
    [null, 'ERR_CONFIG_INVALID', '', /expected an object, got null$/],
    [[], 'ERR_CONFIG_INVALID', '', /expected an object, got an array$/],
    [undefined, 'ERR_CONFIG_MISSING', '', /missing/],
  ])('case %#: %o', (value, code, path, message) => {
    const error = refusal(value)
    expect({ code: error.code, path: error.path }).toEqual({ code, path })
    expect(error.message).toMatch(message)
  })

  test.each([
    ['ERR_KVM_MISSING', 'there is no /dev/kvm: load its module'],
    ['ERR_KVM_PERMISSION', '/dev/kvm exists but may not be opened: add yourself to group kvm'],
    ['ERR_KVM_VERSION', '/dev/kvm speaks version 11 of its API, not 12'],
    ['ERR_KVM_CAPABILITY', 'KVM here lacks KVM_CAP_IMMEDIATE_EXIT'],
    ['ERR_KVM_DEVICE', '/dev/kvm cannot be opened: Input/output error'],
  ] as const)('kvm where there is %s', (code, error) => {
    const without = host('software', { usable: false, code, error })
    const refused = () => resolve({ boot, accel: 'kvm' }, { host: without })
    expect(refused).toThrow(HostError)
    expect(refused).toThrow(expect.objectContaining({ code, path: 'accel' }))
    expect(refused).toThrow(`accel: ${error}; accel "software" needs none of it`)
    expect(resolve({ boot }, { host: without })).toMatchObject({ accel: 'software', engine: 'jit' })
  })

  test('everything that is wrong is listed, misspelt names first', () => {
    const { issues } = refusal({ cpus: 0, memory: 'banana', memroy: 1 })
    expect(issues.map(({ code }) => code)).toEqual([
      'ERR_CONFIG_UNKNOWN',
      'ERR_CONFIG_CPUS',
      'ERR_CONFIG_MEMORY',
      'ERR_CONFIG_MISSING',
    ])
  })

  test('no value of any kind gets through as something else, or crashes', () => {
    fc.assert(
      fc.property(fc.jsonValue(), fc.constantFrom(...Object.keys(vmConfigShape())), (value, key) => {
        let spec: unknown
        try {
          spec = resolve({ boot, [key]: value } as VmConfig)
        } catch (error) {
          expect(error instanceof ConfigError || error instanceof HostError).toBe(true)
          return
        }
        expect(resolve(spec as VmConfig)).toEqual(spec)
      }),
    )
  })
})

function vmConfigShape(): Record<string, unknown> {
  return configJsonSchema()['properties'] as Record<string, unknown>
}

describe('what it resolves into', () => {
  test('every default is filled in', () => {
    const config = { boot: { kernel: 'k', initrd: './a/../i' } }
    expect(resolve(config, { base: '/srv', host: host('software') })).toEqual({
      version: 1,
      name: 'vm',
      uuid: expect.stringMatching(/^[\da-f]{8}-[\da-f]{4}-8[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}$/),
      cpus: { sockets: 1, cores: 1, threads: 1, pin: {} },
      cpu: { model: 'host', features: {} },
      memory: { size: 256 * 2 ** 20, wired: false, hugePages: 'auto' },
      accel: 'software',
      engine: 'jit',
      exits: { hlt: true, pause: true, haltPoll: null },
      boot: { kind: 'kernel', kernel: '/srv/k', initrd: '/srv/i', cmdline: '', modules: [] },
      devices: {
        '0:31:0': {
          type: 'lpc',
          com1: { kind: 'console' },
          com2: { kind: 'none' },
          com3: { kind: 'none' },
          com4: { kind: 'none' },
        },
      },
      debugExit: false,
      rtc: 'utc',
      onReboot: 'restart',
    })
  })

  test('what was given stays', () => {
    const config = defineVm({
      name: 'web1',
      uuid: '01234567-89AB-cdef-0123-456789abcdef',
      cpus: { sockets: 2, cores: 4, pin: { 0: 3, 7: [2, 1, 2] } },
      cpu: { model: 'x86-64-v2', features: { aes: true, rdtscp: false, avx: undefined } },
      memory: { size: '1.5G', wired: true, hugePages: '2M' },
      exits: { hlt: false, haltPoll: 200_000 },
      boot: { rom: 'firmware.bin' },
      devices: { '0:31:0': { type: 'lpc', com1: 'none', com2: 'file:log', com4: { kind: 'file', path: '/abs' } } },
      debugExit: true,
      rtc: 'localtime',
      onReboot: 'exit',
    })
    expect(resolve(config, { base: '/srv' })).toMatchObject({
      name: 'web1',
      uuid: '01234567-89ab-cdef-0123-456789abcdef',
      cpus: { sockets: 2, cores: 4, threads: 1, pin: { 0: [3], 7: [1, 2] } },
      cpu: { model: 'x86-64-v2', features: { aes: true, rdtscp: false } },
      memory: { size: 1.5 * 2 ** 30, wired: true, hugePages: '2M' },
      exits: { hlt: false, pause: true, haltPoll: 200_000 },
      boot: { kind: 'rom', rom: '/srv/firmware.bin' },
      devices: {
        '0:31:0': {
          com1: { kind: 'none' },
          com2: { kind: 'file', path: '/srv/log' },
          com4: { kind: 'file', path: '/abs' },
        },
      },
      debugExit: true,
      rtc: 'localtime',
      onReboot: 'exit',
    })
  })

  test('memory has a size without being told', () => {
    expect(resolve({ boot, memory: { hugePages: 'thp' } }).memory).toEqual({
      size: 256 * 2 ** 20,
      wired: false,
      hugePages: 'thp',
    })
  })

  test('what runs the processors is what the host has', () => {
    const kvm = { accel: 'kvm', engine: null }
    const software = { accel: 'software', engine: 'jit' }
    const paravirtual = host('software', { paravirtual: true })
    expect(resolve({ boot }, { host: host('kvm') })).toMatchObject(kvm)
    expect(resolve({ boot, accel: 'auto', engine: 'auto' }, { host: host('kvm') })).toMatchObject(kvm)
    expect(resolve({ boot, accel: 'kvm', engine: null }, { host: host('kvm') })).toMatchObject(kvm)
    expect(resolve({ boot, accel: 'software' }, { host: host('kvm') })).toMatchObject(software)
    // Whoever names an engine of the software CPU wants the software CPU.
    for (const engine of ['jit', 'interpreter', 'lockstep'] as const) {
      expect(resolve({ boot, engine }, { host: host('kvm') })).toMatchObject({ accel: 'software', engine })
    }
    // A paravirtual KVM is passed over, but taken when it is asked for.
    expect(resolve({ boot }, { host: paravirtual })).toMatchObject(software)
    expect(resolve({ boot, accel: 'kvm' }, { host: paravirtual })).toMatchObject(kvm)
    const spec = resolve({ boot }, { host: host('kvm') })
    expect(resolve(spec, { host: host('kvm') })).toEqual(spec)
  })

  test('the environment names the engine of machines that name none', () => {
    const engineOf = (config: Partial<VmConfig>, accel: 'software' | 'kvm' = 'software') =>
      resolve({ boot, ...config }, { host: host(accel) }).engine
    onTestFinished(() => {
      vi.unstubAllEnvs()
    })
    for (const name of ['', 'auto', 'jit']) {
      vi.stubEnv('SKEP_ENGINE', name)
      expect(engineOf({})).toBe('jit')
    }
    vi.stubEnv('SKEP_ENGINE', 'interpreter')
    for (const engine of [undefined, 'auto', null] as const) expect(engineOf({ engine })).toBe('interpreter')
    expect(engineOf({ engine: 'jit' })).toBe('jit')
    // It is no wish for the software CPU.
    expect(engineOf({}, 'kvm')).toBe(null)

    vi.stubEnv('SKEP_ENGINE', 'lockstep')
    expect(engineOf({})).toBe('lockstep')
    const message = 'engine: "lockstep" (from SKEP_ENGINE in the environment) runs one processor, and cpus makes 2'
    expect(() => engineOf({ cpus: 2 })).toThrow(expect.objectContaining({ code: 'ERR_CONFIG_ENGINE', path: 'engine' }))
    expect(() => engineOf({ cpus: 2 })).toThrow(message)

    vi.stubEnv('SKEP_ENGINE', 'interpeter')
    const refused =
      'the environment variable SKEP_ENGINE: expected auto, jit, interpreter, lockstep or nothing, got "interpeter"; did you mean "interpreter"?'
    expect(() => engineOf({})).toThrow(expect.objectContaining({ code: 'ERR_CONFIG_ENGINE', message: refused }))
    expect(engineOf({ engine: 'jit' })).toBe('jit')
    expect(engineOf({}, 'kvm')).toBe(null)
  })

  const serial = fc.oneof(
    fc.constantFrom('console' as const, 'none' as const),
    fc.constantFrom('a', 'b', 'c').map((path) => `file:/tmp/${path}` as const),
    fc.constant({ kind: 'console' as const }),
  )
  const configs: fc.Arbitrary<VmConfig> = fc.record(
    {
      name: fc.stringMatching(/^[\w .-]{1,40}$/),
      cpus: fc.oneof(
        fc.integer({ min: 1, max: 64 }),
        fc.record({ cores: fc.integer({ min: 1, max: 8 }) }),
        fc.record({ pin: fc.record({ 0: fc.oneof(fc.nat(8191), fc.array(fc.nat(8191), { minLength: 1 })) }) }),
      ),
      cpu: fc.oneof(
        fc.constantFrom(...cpuModels),
        fc.record(
          {
            model: fc.constantFrom(...cpuModels),
            features: fc.dictionary(fc.constantFrom(...cpuFeatures), fc.boolean(), { maxKeys: 5 }),
          },
          { requiredKeys: [] },
        ),
      ),
      exits: fc.record({ hlt: fc.boolean(), haltPoll: fc.option(fc.nat(1e9)) }, { requiredKeys: [] }),
      memory: fc.oneof(
        fc.integer({ min: 2, max: 1 << 20 }).map((mib) => mib * 2 ** 20),
        fc.integer({ min: 2, max: 999 }).map((mib) => `${mib}M` as const),
        fc.record({ wired: fc.boolean(), hugePages: fc.constantFrom<HugePages>('auto', false, 'thp', '2M', '1G') }),
      ),
      boot: fc.oneof(
        fc.record({ kernel: fc.constant('k'), cmdline: fc.string() }, { requiredKeys: ['kernel'] }),
        fc.record({ rom: fc.constant('r') }),
      ),
      devices: fc.record({ '0:31:0': fc.record({ type: fc.constant('lpc' as const), com1: serial, com2: serial }) }),
      debugExit: fc.boolean(),
      onReboot: fc.constantFrom('exit' as const, 'restart' as const),
    },
    { requiredKeys: ['boot'] },
  )

  test('resolving a specification gives the same', () => {
    let accepted = 0
    fc.assert(
      fc.property(configs, (config) => {
        let spec: ReturnType<typeof resolve>
        try {
          spec = resolve(config)
        } catch (error) {
          // Two ports on one file, or a NUL in the command line: the only ways in which these can be wrong.
          expect((error as ConfigError).code).toMatch(/ERR_CONFIG_(SERIAL|INVALID)/)
          return
        }
        accepted += 1
        expect(resolve(spec)).toEqual(spec)
        expect(resolve(JSON.parse(JSON.stringify(spec)))).toEqual(spec)
      }),
    )
    expect(accepted).toBeGreaterThan(20)
  })

  test('a processor is a model, features, or both', () => {
    const cpu = (cpu: VmConfig['cpu']) => resolve({ boot, cpu }).cpu
    expect(cpu('x86-64-v3')).toEqual({ model: 'x86-64-v3', features: {} })
    expect(cpu({ features: { aes: false } })).toEqual({ model: 'host', features: { aes: false } })
    expect(cpu({ model: 'x86-64-v1' })).toEqual({ model: 'x86-64-v1', features: {} })
  })

  test('a machine keeps its UUID, and others have others', () => {
    const uuid = (name: string) => resolve({ boot, name }).uuid
    expect(uuid('a')).toBe(uuid('a'))
    expect(uuid('a')).not.toBe(uuid('b'))
  })
})

test('the documentation has every model and feature of processors', async () => {
  const page = await readFile(new URL('../../docs/cpu-models.md', import.meta.url), 'utf8')
  for (const name of [...cpuModels, ...cpuFeatures]) expect(page).toContain(`\`${name}\``)
})

describe('processors on the command line', () => {
  test.each([
    ['host', { model: 'host', features: {} }],
    ['x86-64-v2,+aes,-rdtscp', { model: 'x86-64-v2', features: { aes: true, rdtscp: false } }],
    ['+aes', { features: { aes: true } }],
    ['-aes,+avx', { features: { aes: false, avx: true } }],
    ['host,+aes,-aes', { model: 'host', features: { aes: false } }],
    ['', undefined],
    ['host,', undefined],
    ['host,aes', undefined],
    ['host,+', undefined],
    [',+aes', undefined],
  ])('%j', (text, parsed) => {
    expect(parseCpu(text)).toEqual(parsed)
  })
})

describe('the JSON Schema', () => {
  const schema = configJsonSchema() as Node
  interface Node {
    properties?: Record<string, Node>
    anyOf?: Node[]
    items?: Node
    description?: string
    additionalProperties?: boolean
  }
  const paths = (node: Node, at: string): string[] => [
    ...Object.entries(node.properties ?? {}).flatMap(([key, child]) => {
      if (key === '$schema') return []
      const path = /^\w+$/.test(key) ? (at ? `${at}.${key}` : key) : `${at}["${key}"]`
      return [path, ...paths(child, path)]
    }),
    ...(node.items ? [`${at}[]`, ...paths(node.items, `${at}[]`)] : []),
    ...(node.anyOf ?? []).flatMap((branch) => paths(branch, at)),
  ]

  test('has the options of the table, each described', () => {
    const inTable = [...configOptions.keys()].filter((path) => path !== '')
    expect([...new Set(paths(schema, ''))].sort()).toEqual(inTable.sort())
    expect(JSON.stringify(schema)).not.toContain('"description":""')
  })

  test('lets nothing unknown through', () => {
    const objects = JSON.stringify(schema).match(/"properties":/g)?.length
    expect(JSON.stringify(schema).match(/"additionalProperties":false/g)?.length).toBe(objects)
  })

  test('an editor\'s "$schema" is no option of the machine', () => {
    expect(validate({ $schema: './node_modules/skep/dist/skep.schema.json', boot })).toEqual({ boot })
  })

  test('options of other versions are not options of this one', () => {
    for (const path of unsupportedOptions.keys()) expect(configOptions.has(path)).toBe(false)
    expect(vmConfigSchema.safeParse({ boot }).success).toBe(true)
  })
})

describe('configuration files', () => {
  test('are read, or refused with the reason', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'skep-config-'))
    try {
      const file = (name: string) => join(folder, name)
      await writeFile(file('good.json'), JSON.stringify({ boot }))
      await writeFile(file('bad.json'), '{ "boot": ')
      await writeFile(file('wrong.json'), '{ "boot": { "kernel": 1 } }')
      expect(await loadConfig(file('good.json'))).toEqual({ boot })
      await expect(loadConfig(file('bad.json'))).rejects.toMatchObject({
        code: 'ERR_CONFIG_FILE',
        message: /is not JSON/,
      })
      await expect(loadConfig(file('none.json'))).rejects.toMatchObject({
        code: 'ERR_CONFIG_FILE',
        message: /no such file/,
      })
      await expect(loadConfig(folder)).rejects.toMatchObject({ code: 'ERR_CONFIG_FILE', message: /a folder/ })
      await expect(loadConfig(file('wrong.json'))).rejects.toMatchObject({
        code: 'ERR_CONFIG_INVALID',
        path: 'boot.kernel',
      })
    } finally {
      await rm(folder, { recursive: true })
    }
  })
})

describe('suggestions', () => {
  test.each([
    ['memroy', 'memory'],
    ['mem', undefined],
    ['cpu', 'cpus'],
    ['Memory', 'memory'],
    ['xyzzy', undefined],
    ['', undefined],
  ])('%j suggests %j', (word, name) => {
    expect(nearest(word, ['memory', 'cpus', 'boot', 'name'])).toBe(name)
  })

  test('a word of any length is answered', () => {
    expect(nearest('m'.repeat(1_000_000), ['memory'])).toBeUndefined()
  })

  test('distance is a metric on edits', () => {
    const word = fc.stringMatching(/^[abc]{0,8}$/)
    fc.assert(
      fc.property(word, word, (a, b) => {
        expect(distance(a, b)).toBe(distance(b, a))
        expect(distance(a, b) === 0).toBe(a === b)
        expect(distance(a, `${a}${b}`)).toBe(b.length)
      }),
    )
  })
})
