import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { beforeEach, describe, expect, test } from 'vitest'
import { diagnose } from '../../ts/src/doctor.js'
import { BootError, ConfigError, HostError, StateError } from '../../ts/src/errors.js'
import type { VmEvent } from '../../ts/src/events.js'
import { Vm } from '../../ts/src/vm.js'

const root = new URL('../../', import.meta.url).pathname
const addon = join(root, 'test/unit/fixtures/addon.cjs')
process.env['SKEP_NATIVE_LIBRARY'] = addon

interface Fake {
  spec: unknown
  calls: unknown[]
  room: number
  say(text: string, port?: number): void
  end(exit: object): void
  tell(...events: object[]): void
}
const fake = createRequire(import.meta.url)(addon) as { Machine: { last: Fake; failure: Error | undefined } }
const config = { boot: { kernel: '/k' } } as const

/** A machine and the fake behind it. */
async function machine(options = {}): Promise<{ vm: Vm; guest: Fake }> {
  const vm = await Vm.create(config, options)
  return { vm, guest: fake.Machine.last }
}

beforeEach(() => {
  fake.Machine.failure = undefined
})

describe('creating', () => {
  test('hands the resolved specification over', async () => {
    const { vm, guest } = await machine()
    expect(guest.spec).toEqual(vm.spec)
    expect(vm.spec.boot).toMatchObject({ kind: 'kernel', kernel: '/k' })
    expect(vm.state).toBe('created')
  })

  test('refuses what cannot be, before the addon is asked', async () => {
    await expect(Vm.create({ ...config, cpus: 0 })).rejects.toBeInstanceOf(ConfigError)
    await expect(Vm.create(config, { timeoutMs: 5 } as never)).rejects.toMatchObject({
      code: 'ERR_ARGUMENT',
      message: /"timeoutMs"/,
    })
    await expect(Vm.create(config, { scrollback: -1 })).rejects.toMatchObject({
      code: 'ERR_ARGUMENT',
      message: /scrollback/,
    })
  })

  test("gives the addon's errors their classes", async () => {
    fake.Machine.failure = new Error(
      '{"code":"ERR_KERNEL_MACHINE","message":"boot.kernel: is for AArch64","path":"boot.kernel"}',
    )
    await expect(Vm.create(config)).rejects.toSatisfy(
      (error) => error instanceof BootError && error.path === 'boot.kernel' && error.output === '',
    )
    fake.Machine.failure = new Error('{"code":"ERR_MEMORY_HOST","message":"no","details":{"size":5}}')
    await expect(Vm.create(config)).rejects.toSatisfy(
      (error) => error instanceof HostError && error.details['size'] === 5,
    )
  })

  test('is broken off by its signal', async () => {
    const reason = new Error('enough')
    await expect(Vm.create(config, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    const controller = new AbortController()
    const creating = Vm.create(config, { signal: controller.signal })
    controller.abort(reason)
    await expect(creating).rejects.toBe(reason)
    expect(fake.Machine.last.calls).toContain('destroy')
  })
})

describe('living', () => {
  test('runs, pauses, goes on and ends, and tells', async () => {
    const { vm } = await machine()
    const events = (async () => {
      const all: VmEvent[] = []
      for await (const event of vm.events()) all.push(event)
      return all
    })()
    const exit = once(vm, 'exit')
    const reset = once(vm, 'reset')
    await vm.start()
    await vm.pause()
    expect(vm.state).toBe('paused')
    await vm.resume()
    await vm.reset()
    await vm.powerButton()
    expect(await vm.exited).toEqual({ reason: 'power-off', status: 1, vcpu: 0 })
    expect((await exit)[0]).toMatchObject({ type: 'exit', reason: 'power-off' })
    expect((await reset)[0]).toMatchObject({ cause: 'host' })
    const told = (await events).map((event) => (event.type === 'state' ? event.state : event.type))
    expect(told).toEqual(['running', 'paused', 'running', 'reset', 'stopped', 'exit'])
    expect(vm.state).toBe('stopped')
    expect(await vm.events().next()).toEqual({ done: true, value: undefined })
  })

  test('a call in the wrong state says which it was', async () => {
    const { vm } = await machine()
    await vm.start()
    await expect(vm.start()).rejects.toSatisfy(
      (error) => error instanceof StateError && error.code === 'ERR_VM_STATE' && error.details['state'] === 'running',
    )
    await expect(vm.vcpu(0).registers()).rejects.toBeInstanceOf(StateError)
    await vm[Symbol.asyncDispose]()
    await expect(vm.start()).rejects.toMatchObject({ code: 'ERR_VM_DESTROYED' })
  })

  test('kill ends it, again and again', async () => {
    const { vm, guest } = await machine()
    await vm.start()
    await vm.kill()
    await vm.kill()
    expect(await vm.exited).toEqual({ reason: 'killed', status: 4 })
    expect(guest.calls.filter((call) => call === 'kill')).toHaveLength(1)
  })

  test('its signal kills it', async () => {
    const controller = new AbortController()
    const { vm } = await machine({ signal: controller.signal })
    await vm.start()
    controller.abort()
    expect(await vm.exited).toMatchObject({ reason: 'killed' })
  })

  test('leaving the block destroys it', async () => {
    let guest: Fake
    let exited: Promise<unknown>
    {
      await using vm = await Vm.create(config)
      guest = fake.Machine.last
      exited = vm.exited
      await vm.start()
    }
    expect(guest.calls).toContain('destroy')
    expect(await exited).toMatchObject({ reason: 'killed' })
  })

  test('waiting for the end can be broken off', async () => {
    const { vm } = await machine()
    await vm.start()
    await expect(vm.wait({ timeout: 1 })).rejects.toMatchObject({ name: 'TimeoutError' })
    const reason = new Error('enough')
    await expect(vm.wait({ signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    await vm.kill()
    expect(await vm.wait({ timeout: 1000 })).toMatchObject({ reason: 'killed' })
  })

  test('one that nobody holds and that does not run is collected, one that runs is not', async () => {
    setFlagsFromString('--expose-gc')
    const gc = runInNewContext('gc') as () => void
    const make = async (start: boolean) => {
      const vm = await Vm.create(config)
      if (start) await vm.start()
      return { weak: new WeakRef(vm), guest: fake.Machine.last }
    }
    const idle = await make(false)
    const running = await make(true)
    for (let i = 0; i < 10; i++) {
      await turn()
      gc()
    }
    expect(idle.weak.deref()).toBeUndefined()
    expect(running.weak.deref()).toBeDefined()
    // The addon may still call, and nobody hears.
    idle.guest.say('x')
    idle.guest.end({ reason: 'killed', status: 4 })
    await running.weak.deref()?.kill()
  })

  test('ref and unref reach the addon', async () => {
    const { vm, guest } = await machine()
    expect(vm.unref().ref()).toBe(vm)
    expect(guest.calls).toEqual(['unref', 'ref'])
  })
})

describe('the inside', () => {
  test('registers are bigints', async () => {
    const { vm, guest } = await machine()
    expect(await vm.vcpu(0).registers()).toMatchObject({
      rax: 0xffff_ffff_ffff_ffffn,
      rip: 0xfff0n,
      cs: { selector: 61440, base: 0xffff0000n },
    })
    await vm.vcpu(0).setRegisters({ rax: 255n, gdtr: { base: 16n, limit: 7 } })
    expect(guest.calls).toEqual([['setRegisters', 0, '{"rax":"0xff","gdtr":{"base":"0x10","limit":7}}']])
    await expect(vm.vcpu(0).setRegisters({ rax: -1n })).rejects.toMatchObject({ code: 'ERR_REGISTERS' })
    await expect(vm.vcpu(0).setRegisters({ rax: 1n << 64n })).rejects.toMatchObject({ code: 'ERR_REGISTERS' })
    for (const index of [1, -1, 0.5])
      expect(() => vm.vcpu(index)).toThrow(expect.objectContaining({ code: 'ERR_VCPU_INDEX' }))
  })

  test('memory is read and written by address', async () => {
    const { vm, guest } = await machine()
    expect((await vm.memory.read(4096, 16)).toString()).toBe('4096+16')
    await vm.memory.write(0x1_0000_0000n, new Uint8Array(Buffer.from('xhellox')).subarray(1, 6))
    expect(guest.calls).toEqual([['writeMemory', 0x1_0000_0000n, 'hello']])
    for (const address of [-1, 1.5, -1n, 1n << 64n, Number.NaN]) {
      await expect(vm.memory.read(address, 1)).rejects.toMatchObject({ code: 'ERR_ARGUMENT' })
    }
    await expect(vm.memory.read(0, -1)).rejects.toMatchObject({ code: 'ERR_ARGUMENT' })
  })

  test('counters and the diagnosis are parsed', async () => {
    const { vm } = await machine()
    const { engine, translations, vcpus } = await vm.stats()
    expect({ engine, blocks: translations.blocks }).toEqual({ engine: 'jit', blocks: 2 })
    expect(vcpus[0]).toMatchObject({ instructions: 5, translations })
    expect(diagnose()).toMatchObject({ accelerator: { auto: 'software' }, engine: { auto: 'jit' } })
  })
})

describe('consoles', () => {
  test('carry what is said and typed, and end before the exit is known', async () => {
    const { vm, guest } = await machine()
    const console = vm.console()
    await vm.start()
    guest.say('login: ')
    await console.waitFor('login: ')
    guest.room = 2
    console.write('root\n')
    await turn()
    guest.room = 100
    guest.tell({ type: 'console-drain', port: 1 })
    expect(
      guest.calls
        .filter((call) => Array.isArray(call) && call[0] === 'consoleWrite')
        .map((call) => (call as string[])[2]),
    ).toEqual(['ro', 'ot\n'])
    expect(guest.calls).toContainEqual(['consoleCredit', 1, 7])
    let ended = false
    console.once('end', () => {
      ended = true
    })
    console.resume()
    guest.end({ reason: 'halt', status: 2 })
    await vm.exited
    await turn()
    expect(ended).toBe(true)
  })

  test('are there where the configuration has them, and anew when destroyed', async () => {
    const { vm } = await machine()
    expect(() => vm.console(2)).toThrow(expect.objectContaining({ code: 'ERR_CONSOLE_PORT' }))
    const first = vm.console(1)
    expect(vm.console(1)).toBe(first)
    first.destroy()
    expect(vm.console(1)).not.toBe(first)
  })
})

describe('run', () => {
  test('gives a machine that is up', async () => {
    const running = Vm.run(config, { until: '# ' })
    for (let i = 0; i < 5; i++) await turn()
    fake.Machine.last.say('# ')
    await using vm = await running
    expect(vm.state).toBe('running')
  })

  test('fails with the output when the guest dies, or takes too long, and leaves nothing', async () => {
    const dying = Vm.run(config, { until: 'login' })
    for (let i = 0; i < 5; i++) await turn()
    fake.Machine.last.say('Kernel panic\n')
    fake.Machine.last.end({ reason: 'triple-fault', status: 3 })
    await expect(dying).rejects.toSatisfy(
      (error) =>
        error instanceof BootError &&
        error.code === 'ERR_BOOT_ENDED' &&
        error.output === 'Kernel panic\n' &&
        /triple-fault/.test(error.message),
    )
    expect(fake.Machine.last.calls).toContain('destroy')
    await expect(Vm.run(config, { until: 'login', timeout: 1 })).rejects.toMatchObject({ code: 'ERR_BOOT_TIMEOUT' })
    expect(fake.Machine.last.calls).toContain('destroy')
  })
})

describe('the addon', () => {
  const builds = ['gnu', 'musl'].map((libc) => join(root, `dist/native/skep.linux-x64-${libc}.node`))
  const build = builds.find((file) => existsSync(file))

  test.runIf(build !== undefined)('has the surface that this side speaks to', () => {
    const { Machine, probe } = createRequire(import.meta.url)(build ?? '') as {
      Machine: { prototype: object; create: unknown }
      probe: unknown
    }
    const wanted = [
      ...(readFileSync(join(root, 'ts/src/native.ts'), 'utf8')
        .split('export interface NativeMachine')[1]
        ?.split('\n}')[0]
        ?.matchAll(/^ {2}(\w+)\(/gm) ?? []),
    ].map(([, name]) => name)
    expect(wanted.length).toBeGreaterThan(15)
    expect(
      Object.getOwnPropertyNames(Machine.prototype)
        .filter((name) => name !== 'constructor')
        .sort(),
    ).toEqual(wanted.sort())
    expect([typeof Machine.create, typeof probe]).toEqual(['function', 'function'])
  })

  test('that is missing or broken is told with a remedy', () => {
    const load = (library: string) => {
      const script = `import { diagnose } from ${JSON.stringify(join(root, 'dist/index.js'))}
        try { diagnose() } catch (error) { console.log(JSON.stringify({ name: error.name, code: error.code, message: error.message })) }`
      const { stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
        encoding: 'utf8',
        env: { ...process.env, SKEP_NATIVE_LIBRARY: library },
      })
      return JSON.parse(stdout)
    }
    for (const library of ['/does/not/exist.node', join(root, 'LICENSE')]) {
      expect(load(library)).toMatchObject({
        name: 'NativeBindingError',
        code: 'ERR_NATIVE_LOAD',
        message: expect.stringContaining(library),
      })
    }
  })
})
