/**
 * What a machine tells: the types of events, and the queue behind {@link Vm.events}.
 *
 * @module
 */
import { addAbortListener } from 'node:events'

/** Where a machine is in its life. There is no way back from `'stopped'`. */
export type VmState = 'created' | 'running' | 'paused' | 'stopped'

/** The machine has entered a state. */
export interface StateEvent {
  type: 'state'
  state: VmState
  /** Milliseconds since 1970 on the host's clock. */
  time: number
}

/** The machine was reset and starts again. */
export interface ResetEvent {
  type: 'reset'
  /** Who asked: {@link Vm.reset}, or the guest by the reset register, the keyboard controller, or port 0x92. */
  cause: 'host' | 'reset-register' | 'keyboard' | 'port92'
  /** Milliseconds since 1970 on the host's clock. */
  time: number
}

/** Why a machine has ended. */
export type ExitReason = 'power-off' | 'reboot' | 'halt' | 'triple-fault' | 'debug-exit' | 'killed' | 'error'

/** How a machine has ended. It is data and never an exception. */
export interface VmExit {
  /** Why. */
  reason: ExitReason
  /**
   * The exit status of bhyve(8): 0 reboot, 1 power-off, 2 halt, 3 triple fault, 4 error or killed; with `debug-exit`,
   * `(value << 1) | 1` of the value that the guest wrote.
   */
  status: number
  /** The processor that caused it, where one did. */
  vcpu?: number
  /** More for a person. */
  detail?: string
}

/** The machine has ended. Always the last event, after all console output. */
export interface ExitEvent extends VmExit {
  type: 'exit'
  /** Milliseconds since 1970 on the host's clock. */
  time: number
}

/** The file behind a serial port failed; that port's output is dropped from now on. */
export interface SerialErrorEvent {
  type: 'serial-error'
  /** Serial port, 1 to 4. */
  port: number
  /** The host's words. */
  message: string
}

/**
 * KVM could not execute an instruction, and the software CPU's interpreter has. Told for the first 16 of a processor, and
 * then when their number is a power of two.
 */
export interface EmulatedEvent {
  type: 'emulated'
  /** Number of the processor. */
  vcpu: number
  /** Linear address of the instruction, such as `0xffffffff81000000`. */
  rip: string
  /** Its bytes in hexadecimal, and those behind it, up to 15. */
  bytes: string
  /** How many such instructions of this processor there have been by now. */
  count: number
  /** Milliseconds since 1970 on the host's clock. */
  time: number
}

/** Whoever reads the events was too slow, and the oldest were dropped. */
export interface LostEvent {
  type: 'lost'
  /** How many. */
  count: number
}

/** What {@link Vm.events} yields; tell them apart by `type`. */
export type VmEvent = StateEvent | ResetEvent | ExitEvent | SerialErrorEvent | EmulatedEvent | LostEvent

/** The listeners of `vm.on`. */
export interface VmEventMap {
  /** The machine has entered a state. */
  state: [StateEvent]
  /** The machine was reset and starts again. */
  reset: [ResetEvent]
  /** The machine has ended. */
  exit: [ExitEvent]
  /** The file behind a serial port failed. */
  'serial-error': [SerialErrorEvent]
  /** The software CPU has executed an instruction for KVM. */
  emulated: [EmulatedEvent]
}

/** An event on its way through the seam: what the API shows, and what only the API itself needs. */
export type NativeEvent = Exclude<VmEvent, LostEvent> | { type: 'console-drain'; port: number }

/** Most events that wait for a slow reader: a guest that reboots for ever must not fill the memory of the host. */
const maxQueue = 4096

/** Events from one moment on, for one reader. */
export class EventQueue implements AsyncIterableIterator<VmEvent> {
  readonly #queue: VmEvent[] = []
  #lost = 0
  #ended = false
  #failure: { reason: unknown } | undefined
  #waiting: (() => void)[] = []
  readonly #onClose: () => void
  #abort: Disposable | undefined

  constructor(signal: AbortSignal | undefined, onClose: (queue: EventQueue) => void) {
    this.#onClose = () => onClose(this)
    if (signal?.aborted) this.#fail(signal.reason)
    else if (signal) this.#abort = addAbortListener(signal, () => this.#fail(signal.reason))
  }

  /** Adds an event. */
  push(event: VmEvent): void {
    if (this.#ended) return
    if (this.#queue.length >= maxQueue) {
      this.#queue.shift()
      this.#lost += 1
    }
    this.#queue.push(event)
    this.#wake()
  }

  /** No more events will come; those that are waiting are still read. */
  end(): void {
    if (this.#ended) return
    this.#ended = true
    this.#abort?.[Symbol.dispose]()
    this.#onClose()
    this.#wake()
  }

  async next(): Promise<IteratorResult<VmEvent, undefined>> {
    for (;;) {
      if (this.#failure) throw this.#failure.reason
      if (this.#lost > 0) {
        const count = this.#lost
        this.#lost = 0
        return { done: false, value: { type: 'lost', count } }
      }
      const value = this.#queue.shift()
      if (value) return { done: false, value }
      if (this.#ended) return { done: true, value: undefined }
      await new Promise<void>((resolve) => this.#waiting.push(resolve))
    }
  }

  async return(): Promise<IteratorResult<VmEvent, undefined>> {
    this.#queue.length = 0
    this.end()
    return { done: true, value: undefined }
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.return()
  }

  #wake(): void {
    for (const resolve of this.#waiting.splice(0)) resolve()
  }

  #fail(reason: unknown): void {
    this.#failure = { reason }
    this.#queue.length = 0
    this.end()
  }
}
