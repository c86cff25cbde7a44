// What a machine asks of the host: where its processors run and what backs its memory, as the kernel shows it.
import { readdir, readFile } from 'node:fs/promises'
import { expect, test } from 'vitest'
import { Vm, type VmConfig } from '../../dist/index.js'
import { accel, patience } from '../helpers/accel.js'
import { testKernel } from '../helpers/guests.js'

/** What the guest writes to port 0xf4 when all is well, as an exit status. */
const PASSED = 33
const MIB = 2 ** 20
const pool = '/sys/kernel/mm/hugepages/hugepages-2048kB'

/** The sum of a field of /proc/self/smaps over the mappings of guest memory, in bytes. */
async function guestMemory(field: string): Promise<number> {
  let ours = false
  let sum = 0
  for (const line of (await readFile('/proc/self/smaps', 'utf8')).split('\n')) {
    if (/^[\da-f]+-[\da-f]+ /.test(line)) ours = line.includes('/memfd:skep-guest')
    const value = ours ? new RegExp(`^${field}: +(\\d+) kB$`).exec(line)?.[1] : undefined
    if (value !== undefined) sum += Number(value) * 1024
  }
  return sum
}

/** Host CPUs of the thread of that name, as the kernel lists them. */
async function cpusOf(thread: string): Promise<string | undefined> {
  for (const task of await readdir('/proc/self/task')) {
    const status = await readFile(`/proc/self/task/${task}/status`, 'utf8').catch(() => '')
    if (status.startsWith(`Name:\t${thread}\n`)) return /^Cpus_allowed_list:\t(.*)$/m.exec(status)?.[1]
  }
  return undefined
}

async function machine(config: Partial<VmConfig>): Promise<Vm> {
  const kernel = await testKernel('processors.elf')
  return await Vm.create({ cpus: 2, accel, debugExit: true, ...config, boot: { kernel } })
}

async function passes(vm: Vm): Promise<void> {
  await vm.start()
  expect(await vm.wait({ timeout: 120_000 * patience })).toMatchObject({ reason: 'debug-exit', status: PASSED })
}

test('processors run on the host CPUs they are pinned to', async () => {
  const ours = /^Cpus_allowed_list:\t(\d+)/m.exec(await readFile('/proc/self/status', 'utf8'))?.[1] ?? ''
  await using vm = await machine({ cpus: { cores: 2, pin: { 0: Number(ours), 1: [Number(ours)] } } })
  expect(await cpusOf('skep-vcpu0')).toBe(ours)
  expect(await cpusOf('skep-vcpu1')).toBe(ours)
  await passes(vm)
})

test('wired memory is there and locked before the guest runs, and no more afterwards', async ({ skip }) => {
  {
    // Without huge pages it is a memfd under KVM too, and has a name in /proc.
    const vm = await machine({ memory: { size: '64M', wired: true, hugePages: false } }).catch(
      (error: { code?: string }) => error,
    )
    if (!(vm instanceof Vm)) {
      expect(vm.code).toBe('ERR_MEMORY_WIRED')
      skip('this process may not lock 64 MiB')
      return
    }
    await using wired = vm
    // All but what the VGA window hides.
    expect(await guestMemory('Locked')).toBe(64 * MIB - 128 * 1024)
    await passes(wired)
  }
  expect(await guestMemory('Locked')).toBe(0)
})

test('memory comes from the pool of huge pages, and goes back', async ({ skip }) => {
  const free = async () => Number(await readFile(`${pool}/free_hugepages`, 'utf8').catch(() => '0'))
  const before = await free()
  if (before < 32) {
    const config = { memory: { size: '1T', hugePages: '2M' } } as const
    await expect(machine(config)).rejects.toMatchObject({ code: /ERR_MEMORY_H(UGE_PAGES|OST)/ })
    skip(`${pool} has ${before} free pages, 32 are needed`)
  }
  {
    await using vm = await machine({ memory: { size: '64M', hugePages: '2M' } })
    expect(await free()).toBe(before - 32)
    expect(await guestMemory('KernelPageSize')).toBe(2 * MIB)
    await passes(vm)
  }
  expect(await free()).toBe(before)
})
