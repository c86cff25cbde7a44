/**
 * The machine.
 *
 * @module
 */
import { EventEmitter } from 'node:events'
import { type ResolveOptions, resolve } from './config/resolve.js'
import type { MachineSpec, VmConfig } from './config/types.js'
import { Console, ConsolePort, defaultScrollback } from './console.js'
import { ArgumentError, BootError, ConsoleError, StateError } from './errors.js'
import {
  EventQueue,
  type ExitEvent,
  type NativeEvent,
  type VmEvent,
  type VmEventMap,
  type VmExit,
  type VmState,
} from './events.js'
import { consoleWindow, crossing, crossingSync, type NativeMachine, native } from './native.js'
import { comPorts } from './pci/layout.js'
import { lpcSlot } from './pci/slot.js'
import { type Abortable, abortable } from './signal.js'
import { GuestMemory, Vcpu, type VmStats } from './state.js'

/** How a machine is created. */
export interface CreateOptions extends Abortable, ResolveOptions {
  /**
   * The machine's life, as in `child_process.spawn`: aborting it breaks off the creation, and kills a machine that has been
   * created.
   */
  signal?: AbortSignal | undefined
  /** Bytes of scroll-back of each console. Default 256 KiB. */
  scrollback?: number | undefined
}

/** How a machine is created and started. */
export interface RunOptions extends CreateOptions {
  /** What the guest says on console 1 when it is up; {@link Vm.run} waits for it, as {@link Console.waitFor} does. */
  until?: string | RegExp | undefined
  /** Milliseconds until `until` must have been said. Default: none. */
  timeout?: number | undefined
}

/** Machines that run: they are not collected, whether anybody holds them or not. The addon ends them with the process. */
const live = new Set<Vm>()

/**
 * A machine. It is created stopped, runs, may be paused, and ends; it never starts again after that.
 *
 * A machine that runs keeps the process alive until it ends, unless {@link Vm.unref} says otherwise. It is killed when the
 * process exits, when its `signal` is aborted, and when an `await using` block that holds it is left.
 *
 * @example
 * ```ts
 * await using vm = await Vm.create({ cpus: 2, memory: '512M', boot: { kernel, initrd, cmdline: 'console=ttyS0' } })
 * await vm.start()
 * await vm.console(1).waitFor('# ', { timeout: 30_000 })
 * await vm.powerButton()
 * const { reason, status } = await vm.exited
 * ```
 */
export class Vm extends EventEmitter<VmEventMap> implements AsyncDisposable {
  /** What was built: every slot, every default. */
  readonly spec: MachineSpec
  /**
   * How the machine ended, as soon as it has: after all of its output, and never a rejection. {@link Vm.wait} is the same
   * with a signal and a timeout.
   */
  readonly exited: Promise<VmExit>
  /** Guest memory, by guest physical address. */
  readonly memory: GuestMemory

  readonly #ports = new Map<number, ConsolePort>()
  readonly #consoles = new Map<number, Console>()
  readonly #queues = new Set<EventQueue>()
  #native!: NativeMachine
  #settle!: (exit: VmExit) => void
  #ended: VmExit | undefined
  #destroyed: Promise<void> | undefined

  private constructor(spec: MachineSpec, scrollback: number) {
    super()
    this.spec = spec
    this.exited = new Promise((settle) => {
      this.#settle = settle
    })
    this.memory = new GuestMemory(() => this.#native)
    for (const [index, name] of comPorts.entries()) {
      if (spec.devices[lpcSlot][name].kind !== 'console') continue
      const port = index + 1
      const wire = {
        write: (data: Buffer) => this.#consoleWrite(port, data),
        credit: (bytes: number) => this.#native.consoleCredit(port, bytes),
      }
      this.#ports.set(port, new ConsolePort(port, wire, scrollback, consoleWindow))
    }
  }

  /**
   * Validates and resolves the configuration, and builds the machine: its memory is there and its guest is loaded, but its
   * processors have not run.
   *
   * @throws ConfigError if the configuration cannot be.
   * @throws BootError if what it boots cannot be loaded.
   * @throws HostError if the host has not what it takes, such as memory.
   * @throws NativeBindingError if the compiled part is missing.
   */
  static async create(config: VmConfig, options: CreateOptions = {}): Promise<Vm> {
    checkOptions('Vm.create', options, ['signal', 'base', 'scrollback'])
    const { signal, scrollback = defaultScrollback, base } = options
    if (!Number.isSafeInteger(scrollback) || scrollback < 0 || scrollback > 2 ** 30) {
      throw new ArgumentError('ERR_ARGUMENT', `scrollback: expected 0 to ${2 ** 30} bytes, got ${scrollback}`)
    }
    signal?.throwIfAborted()
    const vm = new Vm(resolve(config, { base }), scrollback)
    const { onEvents, onOutput } = Vm.#receivers(new WeakRef(vm))
    const spec = JSON.stringify(vm.spec)
    vm.#native = await crossing(() => native().Machine.create(spec, onEvents, onOutput))
    if (signal?.aborted) {
      await vm[Symbol.asyncDispose]()
      signal.throwIfAborted()
    }
    if (signal) vm.#killOn(signal)
    return vm
  }

  /**
   * What the addon calls. It must not keep a machine alive that nobody holds any more (which is destroyed when it is
   * collected), so these functions share no scope with the machine itself.
   */
  static #receivers(weak: WeakRef<Vm>): {
    onEvents: (events: string) => void
    onOutput: (port: number, data: Buffer) => void
  } {
    return {
      onEvents: (events) => {
        const vm = weak.deref()
        if (vm) vm.#receive(events)
      },
      onOutput: (port, data) => {
        const vm = weak.deref()
        if (vm) vm.#ports.get(port)?.receive(data)
      },
    }
  }

  /**
   * Creates and starts a machine, and waits until its guest is up if `until` says how that shows.
   *
   * @throws BootError `ERR_BOOT_TIMEOUT` or `ERR_BOOT_ENDED`, with the last of the serial output, if it does not come up;
   *   the machine is gone then.
   */
  static async run(config: VmConfig, options: RunOptions = {}): Promise<Vm> {
    const { until, timeout, ...rest } = options
    const vm = await Vm.create(config, rest)
    try {
      await vm.start()
      if (until !== undefined) await vm.console(1).waitFor(until, { timeout, signal: rest.signal })
      return vm
    } catch (error) {
      await vm[Symbol.asyncDispose]()
      if (!(error instanceof ConsoleError)) throw error
      const code = error.code === 'ERR_CONSOLE_ENDED' ? 'ERR_BOOT_ENDED' : 'ERR_BOOT_TIMEOUT'
      throw new BootError(code, `the guest did not come up: ${error.message}`, {
        output: error.output,
        details: error.details,
        cause: error,
      })
    }
  }

  /** Name of the machine. */
  get name(): string {
    return this.spec.name
  }

  /** Where the machine is in its life. */
  get state(): VmState {
    if (this.#ended || this.#destroyed) return 'stopped'
    return crossingSync(() => this.#native.state()) as VmState
  }

  /** Lets the processors run. From `'created'`. */
  async start(options: Abortable = {}): Promise<void> {
    live.add(this)
    try {
      await this.#command('start', () => this.#native.start(), options)
    } catch (error) {
      if (this.state === 'created') live.delete(this)
      throw error
    }
  }

  /** Stops every processor at an instruction boundary; the guest's time stands still. From `'running'`. */
  async pause(options: Abortable = {}): Promise<void> {
    await this.#command('pause', () => this.#native.pause(), options)
  }

  /** Lets the processors go on. From `'paused'`. */
  async resume(options: Abortable = {}): Promise<void> {
    await this.#command('resume', () => this.#native.resume(), options)
  }

  /** Resets the machine, as its reset button would; the guest boots again. From `'running'` or `'paused'`. */
  async reset(options: Abortable = {}): Promise<void> {
    await this.#command('reset', () => this.#native.reset(), options)
  }

  /** Presses the power button. What that means is the guest's choice: usually that it shuts down. From `'running'`. */
  async powerButton(options: Abortable = {}): Promise<void> {
    await this.#command('press the power button of', () => this.#native.powerButton(), options)
  }

  /** Ends the machine at once, whatever it does; resolved when it has ended. From any state, and any number of times. */
  async kill(options: Abortable = {}): Promise<void> {
    if (this.#ended) return
    await this.#command('kill', () => this.#native.kill(), options)
    await abortable(this.exited, options.signal)
  }

  /**
   * Waits until the machine has ended.
   *
   * @throws the reason of `signal`, or a `TimeoutError` as of `AbortSignal.timeout` when `timeout` milliseconds have passed.
   */
  async wait(options: Abortable & { timeout?: number | undefined } = {}): Promise<VmExit> {
    checkOptions('wait', options, ['signal', 'timeout'])
    const { signal, timeout } = options
    const signals = [signal, timeout === undefined ? undefined : AbortSignal.timeout(timeout)]
    const given = signals.filter((one) => one !== undefined)
    return await abortable(this.exited, given.length > 0 ? AbortSignal.any(given) : undefined)
  }

  /**
   * The console on serial port `port`, 1 to 4. The same one each time, until it is destroyed.
   *
   * @throws ArgumentError `ERR_CONSOLE_PORT` if that port has no console in the configuration.
   */
  console(port: 1 | 2 | 3 | 4 = 1): Console {
    const existing = this.#consoles.get(port)
    if (existing && !existing.destroyed) return existing
    const core = this.#ports.get(port)
    if (!core) {
      const message = `serial port ${port} has no console; set devices["${lpcSlot}"].com${port} to "console"`
      throw new ArgumentError('ERR_CONSOLE_PORT', message, { details: { port } })
    }
    const console = new Console(core)
    this.#consoles.set(port, console)
    return console
  }

  /**
   * The events from now on, until the machine ends; after that there are none.
   *
   * @example
   * ```ts
   * for await (const event of vm.events({ signal })) log(event)
   * ```
   */
  events(options: Abortable = {}): AsyncIterableIterator<VmEvent> & AsyncDisposable {
    checkOptions('events', options, ['signal'])
    const queue = new EventQueue(options.signal, (closed) => this.#queues.delete(closed))
    if (this.#ended || this.#destroyed) queue.end()
    else this.#queues.add(queue)
    return queue
  }

  /** What the machine has done so far. In every state. */
  async stats(options: Abortable = {}): Promise<VmStats> {
    return JSON.parse(await this.#command('read', () => this.#native.stats(), options)) as VmStats
  }

  /**
   * One of the processors, numbered from 0.
   *
   * @throws ArgumentError `ERR_VCPU_INDEX` if there is none of that number.
   */
  vcpu(index: number): Vcpu {
    const { sockets, cores, threads } = this.spec.cpus
    const count = sockets * cores * threads
    if (!Number.isInteger(index) || index < 0 || index >= count) {
      const message = `there is no vCPU ${index}: this machine has ${count}, numbered from 0`
      throw new ArgumentError('ERR_VCPU_INDEX', message, { details: { vcpu: index, count } })
    }
    return new Vcpu(index, () => this.#native)
  }

  /** Keeps the process alive while the machine runs; so it is from the start. */
  ref(): this {
    this.#native.ref()
    return this
  }

  /** Lets the process end although the machine runs; the machine ends with it. */
  unref(): this {
    this.#native.unref()
    return this
  }

  /** Kills the machine if it still lives and frees everything it holds. Any number of times. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#destroyed ??= crossing(() => this.#native.destroy()).then(() => {
      // A machine that never ran ends without saying so.
      this.#end({ type: 'exit', reason: 'killed', status: 4, time: Date.now() })
    })
    await this.#destroyed
  }

  async #command<T>(verb: string, call: () => Promise<T>, options: Abortable): Promise<T> {
    checkOptions(verb, options, ['signal'])
    options.signal?.throwIfAborted()
    if (this.#destroyed) throw new StateError('ERR_VM_DESTROYED', `cannot ${verb} a machine that has been disposed of`)
    return await abortable(crossing(call), options.signal)
  }

  #killOn(signal: AbortSignal): void {
    const weak = new WeakRef(this)
    const onAbort = (): void => {
      weak
        .deref()
        ?.kill()
        .catch(() => {})
    }
    signal.addEventListener('abort', onAbort, { once: true })
    this.exited.then(() => signal.removeEventListener('abort', onAbort))
  }

  #consoleWrite(port: number, data: Buffer): number {
    // A machine that ends while this is on its way takes no more input: it goes nowhere.
    if (this.#ended || this.#destroyed) return data.length
    try {
      return this.#native.consoleWrite(port, data)
    } catch {
      return data.length
    }
  }

  #receive(batch: string): void {
    for (const event of JSON.parse(batch) as NativeEvent[]) {
      try {
        this.#dispatch(event)
      } catch (error) {
        // A listener threw. That is fatal as anywhere in Node, but the events that follow are told first.
        process.nextTick(() => {
          throw error
        })
      }
    }
  }

  #dispatch(event: NativeEvent): void {
    switch (event.type) {
      case 'console-drain':
        this.#ports.get(event.port)?.drained()
        return
      case 'exit':
        this.#end(event)
        return
      case 'state':
        this.#tell(event)
        this.emit('state', event)
        return
      case 'reset':
        this.#tell(event)
        this.emit('reset', event)
        return
      case 'serial-error':
        this.#tell(event)
        this.emit('serial-error', event)
        return
      case 'emulated':
        this.#tell(event)
        this.emit('emulated', event)
        return
    }
  }

  #tell(event: VmEvent): void {
    for (const queue of this.#queues) queue.push(event)
  }

  #end(event: ExitEvent): void {
    if (this.#ended) return
    const { type: _, time: __, ...exit } = event
    this.#ended = exit
    live.delete(this)
    this.#tell(event)
    for (const queue of this.#queues) queue.end()
    for (const port of this.#ports.values()) port.end(exit)
    this.#settle(exit)
    this.emit('exit', event)
  }
}

function checkOptions(where: string, options: object, known: readonly string[]): void {
  for (const key of Object.keys(options)) {
    if (known.includes(key)) continue
    const message = `${where}: unknown option "${key}"; it has ${known.join(', ')}`
    throw new ArgumentError('ERR_ARGUMENT', message, { details: { option: key } })
  }
}
