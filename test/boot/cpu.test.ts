// Named models and features: what the guest's kernel sees of them, and what the engine refuses.
import { describe, expect, test } from 'vitest'
import { type CpuFeature, cpuFeatures, cpuModels, diagnose, Vm, type VmConfig } from '../../dist/index.js'
import { accel, inL1 } from '../helpers/accel.js'
import { skep } from '../helpers/cli.js'
import { debianCloud, debianWith, testProgram } from '../helpers/guests.js'
import { BOOT_TIMEOUT, Shell } from '../helpers/shell.js'

/** What the diagnosis says of processors of the back end that runs the guests. */
const available = () => {
  const guest = diagnose().guests.find(({ backEnd }) => backEnd === accel)
  if (guest === undefined) throw new Error(`the diagnosis says nothing of ${accel}`)
  return guest
}

/** What `/proc/cpuinfo` says of the first processor. */
async function cpuinfo(shell: Shell): Promise<Map<string, string>> {
  const [first = ''] = (await shell.read('cat /proc/cpuinfo')).split(/\n\n/)
  return new Map(first.split('\n').map((line) => line.split(/\s*:\s*/) as [string, string]))
}

const flags = async (shell: Shell) => (await cpuinfo(shell)).get('flags')?.split(' ')

test('names of models and features are those of the engine', () => {
  const { models, features } = available()
  expect(models.map(({ name }) => name)).toEqual([...cpuModels])
  expect(new Set(Object.keys(features))).toEqual(new Set(cpuFeatures))
})

describe('a guest', () => {
  test(
    'of model x86-64-v2 has what the level has, and no AVX',
    async () => {
      await using shell = await Shell.boot({ cpu: 'x86-64-v2', cpus: 2 })
      const info = await cpuinfo(shell)
      expect(info.get('model name')).toBe('Skep x86-64-v2 processor')
      const seen = info.get('flags')?.split(' ')
      const level = ['cmov', 'cx8', 'fpu', 'fxsr', 'mmx', 'syscall', 'sse', 'sse2']
      level.push('cx16', 'lahf_lm', 'popcnt', 'pni', 'sse4_1', 'sse4_2', 'ssse3', 'nx', 'x2apic', 'rdtscp')
      expect(seen).toEqual(expect.arrayContaining(level))
      const beyond = ['avx', 'avx2', 'xsave', 'aes', 'fma', 'bmi1', 'movbe', 'pcid', 'smep', 'nonstop_tsc']
      expect(beyond.filter((flag) => seen?.includes(flag))).toEqual([])
      // It keeps time by the paravirtual clock, and its kernel has nothing to complain about.
      const source = '/sys/devices/system/clocksource/clocksource0/current_clocksource'
      expect(await shell.read(`cat ${source}`)).toBe('kvm-clock')
      expect(await shell.complaints()).toEqual([])
      expect(await shell.read('nproc')).toBe('2')
    },
    BOOT_TIMEOUT,
  )

  test(
    'without aes has no aes, and all else',
    async () => {
      const { features } = available()
      await using shell = await Shell.boot({ cpu: { features: { aes: false } } })
      const seen = await flags(shell)
      expect(seen).not.toContain('aes')
      const others: CpuFeature[] = ['pclmulqdq', 'nonstop_tsc', 'pcid', 'smep']
      // In L1 Linux finds XSAVE inconsistent, says so, and uses none of it (test/helpers/accel.ts).
      if (!inL1) others.push('avx2')
      for (const name of others) expect(seen?.includes(name), name).toBe(features[name])
      if (!inL1) expect(await shell.complaints()).toEqual([])
    },
    BOOT_TIMEOUT,
  )
})

// Code runs ten times slower in L1.
describe.skipIf(inL1)('a program that goes by the model of the processor finds there what it takes for given:', () => {
  /** What the compiler's library takes the processor for; `host` under KVM is the host's own. */
  const processors: Record<string, string> = {
    'x86-64-v1': 'another',
    'x86-64-v2': 'nehalem',
    'x86-64-v3': 'haswell',
    'x86-64-v4': 'haswell',
  }
  const { models = [] } = diagnose().guests.find(({ backEnd }) => backEnd === accel) ?? {}
  const names = models.filter(({ available }) => available).map(({ name }) => name)

  test.each(names)(
    '%s',
    async (name) => {
      const source = await testProgram('clones')
      const guest = await debianWith('clones', { entries: [{ path: '/clones', type: 'file', source, mode: 0o755 }] })
      await using shell = await Shell.boot({ cpu: name }, { guest })
      const [processor, result] = (await shell.read('/clones 2>&1')).split('\n')
      expect(result).toBe('right')
      expect(processor).toBe(processors[name] ?? processor)
      expect(await shell.complaints()).toEqual([])
    },
    BOOT_TIMEOUT,
  )
})

describe('the engine refuses', () => {
  const refusal = async (cpu: VmConfig['cpu']) => {
    const { kernel } = await debianCloud()
    try {
      await using _ = await Vm.create({ boot: { kernel }, cpu, accel: 'software' })
    } catch (error) {
      return error
    }
    throw new Error(`accepted: ${JSON.stringify(cpu)}`)
  }

  test.each<[string, VmConfig['cpu'], object]>([
    [
      'a feature that cannot be had',
      { features: { fma4: true } },
      {
        name: 'HostError',
        code: 'ERR_CPU_UNAVAILABLE',
        path: 'cpu.features.fma4',
        message: expect.stringMatching(/software CPU/),
      },
    ],
    [
      'a feature without what it needs',
      { model: 'x86-64-v2', features: { xsaveopt: true } },
      {
        name: 'ConfigError',
        code: 'ERR_CPU_FEATURE_NEEDS',
        path: 'cpu.features.xsaveopt',
        details: { missing: ['xsave'] },
      },
    ],
    [
      'to take away what others need',
      { model: 'x86-64-v2', features: { sse4_1: false } },
      { code: 'ERR_CPU_FEATURE_NEEDED', path: 'cpu.features.sse4_1', details: { dependents: ['sse4_2'] } },
    ],
    [
      'to take away what every processor has',
      { features: { lm: false } },
      { code: 'ERR_CPU_FEATURE_FIXED', path: 'cpu.features.lm' },
    ],
  ])('%s', async (_, cpu, expected) => {
    expect(await refusal(cpu)).toMatchObject(expected)
  })

  test('at the terminal, by the name of the option', async () => {
    const { kernel } = await debianCloud()
    const { status, stdout, stderr } = await skep(['run', '--kernel', kernel, '--cpu', 'host,+fma4'])
    expect(stderr).toMatch(/^skep: --cpu: CPU feature fma4 .* cannot be had here; .*\[ERR_CPU_UNAVAILABLE\]\n$/)
    expect({ status, stdout }).toEqual({ status: 4, stdout: '' })
  })
})

test('the doctor lists what there is', async () => {
  const { stdout } = await skep(['doctor'])
  expect(stdout).toMatch(/^guest CPUs +software: host, x86-64-v1.*x86-64-v4/m)
  const { guests } = JSON.parse((await skep(['doctor', '--json'])).stdout)
  expect(guests[0].features).toMatchObject({ lm: true, fma4: false })
  // A model is there or says why it is not.
  for (const { available, reason } of guests[0].models) expect(reason === undefined).toBe(available)
  const { name, available } = guests[0].models.at(-1)
  expect({ name, available }).toEqual({ name: 'x86-64-v4', available: guests[0].features['avx512vl'] })
})
