// stress-ng in a guest with two vCPUs, verifying what it does, for SKEP_STRESS_SECONDS in all (npm run test:stress: 10 minutes). Left out where
// they are not given.
import { beforeAll, describe, expect, test } from 'vitest'
import { debianWith, type Guest } from '../helpers/guests.js'
import { Shell } from '../helpers/shell.js'

const SECONDS = Number(process.env['SKEP_STRESS_SECONDS'] ?? 20)

/** Stressors that run at once, two of each, and what they get of the time. */
const groups: Record<string, { share: number; stressors: string[] }> = {
  'the main ones': { share: 0.5, stressors: ['cpu', 'vm', 'fork', 'futex', 'mmap', 'signal'] },
  'code and branches': {
    share: 0.15,
    stressors: ['icache', 'funccall', 'branch', 'goto', 'longjmp', 'far-branch', 'regs', 'opcode'],
  },
  'computation and memory': {
    share: 0.15,
    stressors: ['vecmath', 'vecwide', 'matrix', 'qsort', 'hash', 'memcpy', 'atomic', 'lockbus', 'fp-error'],
  },
  'exceptions and the kernel': {
    share: 0.2,
    stressors: ['sigfpe', 'sigsegv', 'sigtrap', 'ptrace', 'mremap', 'munmap', 'switch', 'clone', 'fault', 'rlimit'],
  },
}

const wanted = process.env['SKEP_STRESS_SECONDS'] !== undefined && process.env['SKEP_L1'] === undefined

describe.skipIf(!wanted)(`stress-ng for ${SECONDS} s`, () => {
  let guest: Guest

  beforeAll(async () => {
    guest = await debianWith('stress-ng', { packages: ['stress-ng'] })
  }, 600_000)

  test.each(Object.entries(groups))('%s', { timeout: 300_000 + SECONDS * 3000 }, async (_, { share, stressors }) => {
    await using shell = await Shell.boot({ cpus: 2, memory: '1G' }, { guest })
    await shell.read('echo 0 > /proc/sys/debug/exception-trace')
    await shell.read('mount -t tmpfs -o size=128M tmpfs /tmp && cd /tmp')
    const seconds = Math.max(1, Math.round(SECONDS * share))
    const wanted = stressors.map((name) => `--${name} 2`).join(' ')
    const options = `--verify --vm-bytes 64M --mmap-bytes 16M --timeout ${seconds}s --metrics-brief`
    const command = `stress-ng ${wanted} ${options} 2>&1`
    const { output, status } = await shell.run(command, 120_000 + seconds * 3000)
    expect(output.split('\n').filter((line) => /fail|error|abort/i.test(line) && !/fp-error/.test(line))).toEqual([])
    expect(status, output).toBe(0)
    expect(output).toContain('successful run completed')
    // Programs that stress-ng makes fail are not the kernel's complaint.
    expect((await shell.complaints()).filter((line) => !/stress-ng/.test(line))).toEqual([])
    shell.type('poweroff -f')
    expect(await shell.vm.exited).toMatchObject({ reason: 'power-off' })
  })
})
