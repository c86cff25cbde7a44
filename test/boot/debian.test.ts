// Debian's unmodified cloud kernel, driven over its serial console. One boot a number of vCPUs; the checks share it.
import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { accel, progress } from '../helpers/accel.js'
import { BOOT_TIMEOUT, Shell } from '../helpers/shell.js'

describe.each([1, 2])('Debian with %i vCPU', (cpus) => {
  let shell: Shell

  beforeAll(async () => {
    shell = await Shell.boot({ cpus })
  }, BOOT_TIMEOUT)

  afterAll(async () => {
    await shell?.[Symbol.asyncDispose]()
  })

  test('is the kernel that the image names, and its log has no complaints', async () => {
    expect(shell.vm.state).toBe('running')
    expect(await shell.read('uname -srm')).toMatch(/^Linux \d+\.\d+\.\S+-cloud-amd64 x86_64$/)
    expect(await shell.complaints()).toEqual([])
  })

  test('/proc/cpuinfo shows the processors', async () => {
    const cpuinfo = await shell.read('cat /proc/cpuinfo')
    expect(cpuinfo.match(/^processor\s*: \d+$/gm)).toEqual(
      Array.from({ length: cpus }, (_, id) => `processor\t: ${id}`),
    )
    const flags = cpuinfo.match(/^flags\s*: (.*)$/m)?.[1]?.split(' ')
    expect(flags).toEqual(expect.arrayContaining(['fpu', 'lm', 'nx', 'sse2', 'syscall', 'tsc', 'hypervisor']))
    // Nothing that we do not run may be announced.
    expect(flags).not.toContain('vmx')
    expect(flags).not.toContain('svm')
    expect(await shell.read('nproc')).toBe(String(cpus))
  })

  test.runIf(accel === 'kvm')('the exits of the boot are told by reason', async () => {
    const { vcpus } = await shell.vm.stats()
    expect(vcpus).toHaveLength(cpus)
    // The serial port, the HPET and the IOAPIC, whichever processor the guest had them used by.
    const all = vcpus.flatMap(({ exits }) => Object.entries(exits))
    const seen = (name: string) => all.filter(([reason]) => reason === name).reduce((sum, [, count]) => sum + count, 0)
    for (const reason of ['portRead', 'portWrite', 'memoryRead', 'memoryWrite'])
      expect(seen(reason), reason).toBeGreaterThan(10)
    for (const reason of ['failedEntry', 'systemEvent', 'other']) expect(seen(reason), reason).toBe(0)
    // These are returns to this process; the kernel counts those that it deals with by itself too.
    const ofTheKernel = vcpus.reduce((sum, { kernel }) => sum + (kernel['exits'] ?? 0), 0)
    expect(ofTheKernel).toBeGreaterThan(seen('portRead') + seen('portWrite') + seen('memoryRead') + seen('memoryWrite'))
  })

  test('memory is what was asked for', async () => {
    const total = Number((await shell.read('grep MemTotal /proc/meminfo')).match(/\d+/)?.[0]) * 1024
    expect(total).toBeGreaterThan(400 << 20)
    expect(total).toBeLessThanOrEqual(512 << 20)
  })

  test('sha256 of known data is right', async () => {
    const data = Array.from({ length: 20_000 }, (_, index) => `${index + 1}\n`).join('')
    const wanted = createHash('sha256').update(data).digest('hex')
    expect(await shell.read('seq 1 20000 | sha256sum')).toBe(`${wanted}  -`)
  })

  if (cpus > 1)
    test('both vCPUs do work of their own', async () => {
      const one = createHash('sha256')
        .update('a'.repeat(1 << 20))
        .digest('hex')
      const jobs = Array.from(
        { length: cpus },
        (_, id) => `(taskset ${(1 << id).toString(16)} sh -c 'head -c 1048576 /dev/zero | tr "\\0" a | sha256sum') &`,
      )
      const { output } = await shell.run(`${jobs.join(' ')} wait`)
      expect(output.match(/^[0-9a-f]{64} {2}-$/gm)).toEqual(Array(cpus).fill(`${one}  -`))
      const { vcpus } = await shell.vm.stats()
      expect(vcpus).toHaveLength(cpus)
      for (const vcpu of vcpus) expect(progress(vcpu)).toBeGreaterThan(accel === 'kvm' ? 100 : 10_000)
    })

  test('the guest clock keeps time with the host clock', async () => {
    // Each reading of the guest's clock happens somewhere between two readings of the host's.
    const reading = async () => {
      const before = performance.now()
      const guest = Number(await shell.read("cut -d' ' -f1 /proc/uptime")) * 1000
      return { before, guest, after: performance.now() }
    }
    await reading()
    const from = await reading()
    const slept = performance.now()
    await shell.read('sleep 5')
    const sleepTook = performance.now() - slept
    const to = await reading()
    const passed = to.guest - from.guest
    const RESOLUTION = 10
    expect(passed).toBeGreaterThanOrEqual((to.before - from.after) * 0.99 - RESOLUTION)
    expect(passed).toBeLessThanOrEqual((to.after - from.before) * 1.01 + RESOLUTION)
    // The guest's timer interrupts are on time too, not only its counter.
    expect(sleepTook).toBeGreaterThanOrEqual(5_000 * 0.99)
  })

  test('the guest knows what day it is', async () => {
    const before = Math.floor(Date.now() / 1000)
    const guest = Number(await shell.read('date +%s'))
    expect(guest).toBeGreaterThanOrEqual(before - 2)
    expect(guest).toBeLessThanOrEqual(Date.now() / 1000 + 2)
  })

  test('pause stops every vCPU, and resume goes on where it was', async () => {
    await shell.read('echo counting')
    await shell.vm.pause()
    expect(shell.vm.state).toBe('paused')
    const counts = async () => (await shell.vm.stats()).vcpus.map(progress)
    const still = await counts()
    const answer = shell.run('echo alive')
    let answered = false
    answer.then(() => {
      answered = true
    })
    await sleep(300)
    expect(await counts()).toEqual(still)
    expect(answered).toBe(false)

    const { rip, cr0, cr3 } = await shell.vm.vcpu(0).registers()
    expect(rip).not.toBe(0n)
    // Protected mode with paging: CR0.PE and CR0.PG.
    expect(cr0 & 0x8000_0001n).toBe(0x8000_0001n)
    expect((await shell.vm.memory.read(cr3 & ~0xfffn, 4096)).some((byte) => byte !== 0)).toBe(true)

    await shell.vm.resume()
    expect(await answer).toEqual({ output: 'alive\n', status: 0 })
  })

  test('the power button shuts the guest down', async () => {
    await shell.vm.powerButton()
    expect(await shell.vm.exited).toMatchObject({ reason: 'power-off', status: 1 })
    expect(shell.vm.state).toBe('stopped')
  })
})
